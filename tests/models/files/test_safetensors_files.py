from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch

from models.files import safetensors_files as module
from models.files.fingerprint import (
    checkpoint_fingerprint,
)
from models.files.safetensors_files import (
    check_file,
    checkpoint_files,
    read_stored,
    stored_tensors,
    weight_bytes,
)
from tests.conftest import tiny_llama
from tests.models.files.test_fingerprint import refusal, saved


@pytest.fixture
def sharded(tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="30kB")
    return tmp_path / "sharded"


def test_chunks_do_not_count_and_bound_the_memory(tmp_path, monkeypatch):
    source = saved(tmp_path / "big", a=torch.arange(2_000_000), b=torch.tensor(3))
    tracemalloc.start()
    whole = checkpoint_fingerprint(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20  # the tensor takes 16 MB
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4099)
    assert checkpoint_fingerprint(source) == whole


def test_weights_that_are_not_there(tmp_path, sharded):
    (tmp_path / "empty").mkdir()
    for call in (checkpoint_files, checkpoint_fingerprint):
        assert "got none" in refusal(call, str(tmp_path / "empty"))
        assert "absent" in refusal(call, str(tmp_path / "absent"))
        assert "nobody/nothing" in refusal(call, "nobody/nothing")
        refusal(call, "")
    first = checkpoint_files(str(sharded))[0]
    first.unlink()
    assert first.name in refusal(checkpoint_files, str(sharded))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"metadata": {}, "weight_map": 3}'])
def test_an_index_that_cannot_be_read(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "index.json" in refusal(checkpoint_files, str(sharded))


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_files_cut_short_are_refused(tmp_path, tiny_llama_dir, kept):
    copy = Path(shutil.copytree(tiny_llama_dir, tmp_path / "copy"))
    weights = copy / "model.safetensors"
    check_file(weights)
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "whole safetensors" in refusal(check_file, weights)
    assert "whole safetensors" in refusal(checkpoint_fingerprint, str(copy))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_tensors_and_rows_are_read_by_their_bytes(tmp_path, dtype):
    values = torch.arange(24).view(4, 3, 2).to(dtype)
    source = saved(tmp_path / "some", first=torch.ones(5), values=values, none=torch.zeros(0, 3).to(dtype))
    stored = {tensor.name: tensor for tensor in stored_tensors(checkpoint_files(source)[0])}
    whole = read_stored(stored["values"])
    assert torch.equal(whole, values) and whole.dtype == dtype
    assert torch.equal(read_stored(stored["values"], 2), values[2])
    assert read_stored(stored["none"]).shape == (0, 3)


def test_a_file_that_ends_before_a_tensor_and_unknown_dtypes_are_refused(tmp_path):
    source = saved(tmp_path / "some", values=torch.arange(24))
    (tensor,) = stored_tensors(checkpoint_files(source)[0])
    assert "F9" in refusal(read_stored, tensor._replace(dtype="F9"))
    tensor.path.write_bytes(tensor.path.read_bytes()[:-1])
    assert "expected 192 bytes of values" in refusal(read_stored, tensor)


def test_the_bytes_of_weights_are_those_of_all_files(sharded):
    files = list(sharded.glob("*.safetensors"))
    assert len(files) > 1 and weight_bytes(str(sharded)) == sum(path.stat().st_size for path in files)
