"""Time and peak memory of ``fedgraft bootstrap``, measured in a process of its own.

``python -m benchmarks.support.bootstrap.process OPTION...`` prints JSON after the output of the command.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.support.runner import peak_bytes
from fedgraft import main


def measure_bootstrap(options: Sequence[str]) -> dict[str, float]:
    """Seconds of the command and peak memory of its process in bytes, libraries included.

    Args:
        options: options of the command, except ``--out``.

    Raises:
        RuntimeError: the command failed; its error is on stderr.
    """
    with TemporaryDirectory(prefix="fedgraft-") as folder:
        started = time.perf_counter()
        if code := main(["bootstrap", *options, "--out", str(Path(folder) / "graph")]):
            raise RuntimeError(f"fedgraft bootstrap ended with exit code {code}")
        return {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}


if __name__ == "__main__":
    print(json.dumps(measure_bootstrap(sys.argv[1:])))
