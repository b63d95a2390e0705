"""Time, memory and result of a command in a process of its own."""

from __future__ import annotations

import pytest

from benchmarks.support.bootstrap.process import measure_command
from benchmarks.support.runner import measured_apart


def test_time_memory_and_result_of_the_command_are_measured(tmp_path, tiny_llama_dir):
    options = [
        "--model",
        str(tiny_llama_dir),
        "--experts",
        "4",
        "--report",
        "none",
        "--out",
        str(tmp_path / "graph"),
    ]
    texts = ["--calibration-tokens", "256", "--evaluation-tokens", "256"]
    found = measured_apart("bootstrap.process", ["bootstrap", *options, *texts])
    assert found["seconds"] > 0 and found["peak_bytes"] > 50e6
    assert found["result"]["out"] == str(tmp_path / "graph") and found["result"]["experts"] == 4


def test_a_command_that_fails_is_an_error(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="bootstrap ended with exit code 2"):
        measure_command(
            ["bootstrap", "--model", str(tmp_path), "--experts", "4", "--out", str(tmp_path / "graph")]
        )
