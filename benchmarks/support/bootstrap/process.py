"""Time and peak memory of one command, measured in a process of its own.

``python -m benchmarks.support.bootstrap.process WORD...`` runs ``fedgraft WORD... --json`` and prints JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.support.process_peak import peak_bytes
from fedgraft import main


def measure_command(words: Sequence[str]) -> dict[str, Any]:
    """Seconds of a command, peak memory of its process in bytes, libraries included, and its result.

    Args:
        words: verb and options, without ``--json``.

    Raises:
        RuntimeError: the command failed; its error is on stderr.
    """
    started, output = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main([*words, "--json"])
    if code:
        raise RuntimeError(f"fedgraft {words[0]} ended with exit code {code}")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": peak_bytes(), "result": json.loads(output.getvalue())}


if __name__ == "__main__":
    print(json.dumps(measure_command(sys.argv[1:])))
