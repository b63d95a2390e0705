"""Memory and file sizes of pruning a checkpoint."""

from __future__ import annotations

import pytest

from benchmarks.support.prune_peak import measure_pruning
from benchmarks.support.runner import measured_apart
from tests.support.tiny_moes import saved_moe


def test_memory_of_pruning_is_measured(tmp_path, tiny_tokenizer):
    found = measure_pruning(saved_moe("mixtral", tmp_path, tiny_tokenizer), tmp_path / "out", 2)
    assert 0 < found["bytes_after"] < found["bytes_before"] and found["peak_bytes"] >= 0


def test_the_command_prints_the_measured_sizes(tmp_path, tiny_tokenizer):
    source, out = saved_moe("mixtral", tmp_path, tiny_tokenizer), tmp_path / "out"
    found = measured_apart("prune_peak", [str(source), str(out), "3"])
    weights = {
        folder: sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (source, out)
    }
    assert found["bytes_before"] == pytest.approx(weights[source], rel=0.01)
    assert found["bytes_after"] == pytest.approx(weights[out], rel=0.01)
