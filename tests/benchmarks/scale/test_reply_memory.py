from __future__ import annotations

from benchmarks.scale.reply_memory import reply_memory


def test_a_usage_count_takes_eight_bytes_and_a_unit_some_hundred():
    found = reply_memory(4, 32)
    assert 8 <= found["per usage count"] < 9
    assert 150 < found["per unit"] < 1000
