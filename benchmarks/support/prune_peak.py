"""Peak memory of pruning one checkpoint, measured in a process of its own.

``python -m benchmarks.support.prune_peak SOURCE OUT KEEP`` keeps the first KEEP experts of each layer and prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import psutil

from benchmarks.support.process_peak import peak_bytes
from models.moe_files.layout import read_moe_layout
from models.moe_files.prune import prune_checkpoint


def measure_pruning(source: Path, out: Path, keep: int) -> dict[str, float]:
    """Prune a checkpoint; returns the peak memory minus that of imports, and the weight files' sizes, in bytes.

    Args:
        source: checkpoint of an MoE.
        out: new checkpoint.
        keep: experts of each layer that are kept, the first ones.
    """
    imported = psutil.Process().memory_info().rss
    layers = range(len(read_moe_layout(source).layers))
    report = prune_checkpoint(source, out, {layer: np.arange(keep) for layer in layers})
    peak = peak_bytes()
    return {
        "peak_bytes": max(peak - imported, 0),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
    }


if __name__ == "__main__":
    print(json.dumps(measure_pruning(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
