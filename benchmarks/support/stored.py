"""Results of single measurements in files, from which an interrupted benchmark goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from configs.output import write_json
from configs.paths import cache_folder


def digest(facts: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of facts as JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def stored(folder: Path, facts: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """Result of ``compute`` as JSON types, read from ``folder`` where one of the same facts is stored there.

    Args:
        folder: receives one file per result; it is made.
        facts: everything that the result depends on, as JSON types.
        compute: measurement; its result is JSON.
    """
    path = folder / f"{digest(facts)}.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"facts": dict(facts), "result": compute()})
    return json.loads(path.read_text(encoding="utf-8"))["result"]


def chosen_work(name: str, work: Path | None, *, quick: bool) -> Path | None:
    """Folder of finished results: the given one, else for a full run that of benchmark ``name`` in the user's cache."""
    return work if work or quick else cache_folder() / "benchmarks" / name


@contextmanager
def work_folder(work: Path | None) -> Iterator[Path]:
    """The folder ``work`` of finished results, or a temporary one for None."""
    if work is not None:
        yield work
        return
    with TemporaryDirectory(prefix="fedgraft-") as folder:
        yield Path(folder)
