from __future__ import annotations

import math

from benchmarks.wire import measure, smallest_bytes

FIGURES = {
    "index_over_entropy_uniform_max",
    "index_over_entropy_real_max",
    "int4_bits",
    "bit2_bits",
    "overhead_bytes",
    "container_share_100k",
    "pack_speed_ratio",
    "pack_speed_ratio_same_selection",
    "pack_speed_ratio_without_selection",
    "unpack_speed_ratio",
    "size_ratio",
}


def test_a_quick_run_measures_every_figure():
    measured = measure(True, lambda *step: None)
    assert set(measured.figures) == FIGURES
    assert all(
        value is not None and math.isfinite(value) and value > 0 for value in measured.figures.values()
    )
    assert measured.figures["size_ratio"] < 0.5 and measured.figures["overhead_bytes"] == smallest_bytes()
    assert set(measured.peers["sent"]) >= {"flower fp32", "flower fp16", "bf16 zstd -3", "bitsandbytes nf4"}
    for row in [*measured.peers["uniform"].values(), *measured.peers["real"].values()]:
        assert (
            row["kept"] <= row["entries"]
            and row["index_bytes"] + row["kept"] * row["bits_4"] / 8 < row["bytes"]
        )
