"""Time and memory of the command ``fedgraft bootstrap``."""

from __future__ import annotations

from benchmarks.support.runner import measured_apart


def test_time_and_memory_of_the_command_are_measured(tiny_llama_dir):
    options = ["--model", str(tiny_llama_dir), "--experts", "4", "--report", "none"]
    texts = ["--calibration-tokens", "256", "--evaluation-tokens", "256"]
    found = measured_apart("bootstrap.process", [*options, *texts])
    assert found["seconds"] > 0 and found["peak_bytes"] > 50e6
