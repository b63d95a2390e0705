"""Faults of the clients of a run, in a file that its server and client processes share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.output import write_json

LATE, DROPPED = "late", "dropped"
_FAULTS = "faults.json"


def faulty_count(asked: int) -> int:
    """Late clients among those asked, an eighth; as many fail, and at least one does neither."""
    return min(math.ceil(asked / 8), (asked - 1) // 2)


def faulty(asked: Sequence[int]) -> dict[int, str]:
    """Fault by node id: the last nodes are late, as many before them fail.

    The last ones, since a simulated client that waits occupies a core that others would work on.

    Args:
        asked: node ids in the order in which they are asked.
    """
    each = faulty_count(len(asked))
    dropped, late = asked[len(asked) - 2 * each : len(asked) - each], asked[len(asked) - each :]
    return dict.fromkeys(dropped, DROPPED) | dict.fromkeys(late, LATE)


def write_faults(log_dir: Path, server_round: int, faults: Mapping[int, str]) -> None:
    """Write the faults of a round, by node id, to ``log_dir``; those of earlier rounds are replaced."""
    by_node = {str(node): fault for node, fault in faults.items()}
    write_json(log_dir / _FAULTS, {"round": server_round, "faults": by_node})


def read_fault(log_dir: Path, server_round: int, node: int) -> str:
    """Fault of a node in a round; empty: none."""
    path = log_dir / _FAULTS
    if not path.is_file():
        return ""
    written = json.loads(path.read_text(encoding="utf-8"))
    return written["faults"].get(str(node), "") if written["round"] == server_round else ""
