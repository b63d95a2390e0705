from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from models.files import fingerprint as module
from models.files.fingerprint import (
    checkpoint_fingerprint,
    fingerprint,
    fingerprint_of,
    remembered_fingerprint,
)
from models.files.safetensors_files import checkpoint_files
from tests.conftest import tiny_llama


def saved(directory: Path, **tensors: torch.Tensor) -> str:
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    return str(directory)


def refusal(call, source) -> str:
    with pytest.raises(UserError) as error:
        call(source)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def sharded(tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="30kB")
    return tmp_path / "sharded"


def test_fingerprints_know_values_names_shapes_and_dtypes():
    def of(**tensors):
        module = torch.nn.Module()
        for name, value in tensors.items():
            module.register_parameter(name, torch.nn.Parameter(value))
        return fingerprint(module)

    base = of(a=torch.arange(6.0), b=torch.ones(2))
    others = [
        of(a=torch.arange(6.0) + 1e-6, b=torch.ones(2)),
        of(c=torch.arange(6.0), b=torch.ones(2)),
        of(a=torch.arange(6.0).view(2, 3), b=torch.ones(2)),
        of(a=torch.arange(6.0), b=torch.ones(2).half()),
        of(a=torch.arange(6.0)),
    ]
    assert base == of(b=torch.ones(2), a=torch.arange(6.0))
    assert len({base, *others}) == 6 and len(base) == 64
    assert of(a=torch.zeros(2, 3).T) == of(a=torch.zeros(3, 2))


def test_a_checkpoint_s_fingerprint_knows_values_names_shapes_and_dtypes(tmp_path):
    same = [
        saved(tmp_path / "a", a=torch.arange(6.0), b=torch.ones(2)),
        saved(tmp_path / "b", b=torch.ones(2), a=torch.arange(6.0)),
    ]
    others = [
        saved(tmp_path / "1", a=torch.arange(6.0) + 1e-6, b=torch.ones(2)),
        saved(tmp_path / "2", c=torch.arange(6.0), b=torch.ones(2)),
        saved(tmp_path / "3", a=torch.arange(6.0).view(2, 3), b=torch.ones(2)),
        saved(tmp_path / "4", a=torch.arange(6.0), b=torch.ones(2).half()),
        saved(tmp_path / "5", a=torch.arange(6.0)),
        saved(tmp_path / "6", a=torch.arange(6.0), b=torch.ones(2), c=torch.tensor(1.0)),
        saved(tmp_path / "7", a=torch.arange(6.0), b=torch.ones(2), c=torch.empty(0)),
    ]
    digests = {checkpoint_fingerprint(source) for source in (*same, *others)}
    assert len(digests) == 8 and {len(digest) for digest in digests} == {64}


def test_how_tensors_are_spread_over_files_does_not_count(tmp_path, sharded):
    tiny_llama().save_pretrained(tmp_path / "whole")
    assert len(checkpoint_files(str(sharded))) > 3
    assert checkpoint_files(str(tmp_path / "whole")) == [tmp_path / "whole/model.safetensors"]
    assert checkpoint_fingerprint(str(sharded)) == checkpoint_fingerprint(str(tmp_path / "whole"))


def test_one_changed_byte_is_seen(tmp_path, tiny_llama_dir):
    copy = Path(shutil.copytree(tiny_llama_dir, tmp_path / "copy"))
    base = checkpoint_fingerprint(str(tiny_llama_dir))
    assert checkpoint_fingerprint(str(copy)) == base
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert checkpoint_fingerprint(str(copy)) != base


def test_a_hub_id_is_found_in_the_cache(tmp_path, monkeypatch, sharded, tiny_llama_dir):
    for name, folder in (("whole", tiny_llama_dir), ("parts", sharded)):
        repository = tmp_path / f"hub/models--owner--{name}"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert [file.name for file in checkpoint_files("owner/whole")] == ["model.safetensors"]
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert {file.name for file in checkpoint_files("owner/parts")} == set(index["weight_map"].values())
    assert checkpoint_fingerprint("owner/whole") == checkpoint_fingerprint(str(tiny_llama_dir))


def test_the_fingerprint_covers_every_tensor_of_a_graph(tmp_path, tiny_graph_dir):
    base = checkpoint_fingerprint(str(tiny_graph_dir))
    tensors = load_file(tiny_graph_dir / "model.safetensors")
    for number, name in enumerate(["model.layers.1.mlp.edges", "model.layers.0.mlp.router"]):
        other = tensors[name].logical_not() if tensors[name].dtype == torch.bool else tensors[name] + 1
        assert checkpoint_fingerprint(saved(tmp_path / str(number), **tensors | {name: other})) != base


def test_parameters_that_come_one_at_a_time_have_the_model_s_fingerprint():
    model = tiny_llama(tie_word_embeddings=True)
    assert fingerprint_of(sorted(model.named_parameters())) == fingerprint(model)
    assert fingerprint_of([]) != fingerprint(model)


def settled(source: str, seconds: float = 60.0, file: str = "model.safetensors") -> str:
    """Give a file a time of change that lies back."""
    then = time.time() - seconds
    os.utime(Path(source) / file, (then, then))
    return source


def counting(monkeypatch) -> list[str]:
    """The sources that are read from now on."""
    read: list[str] = []

    def noting(source: str) -> str:
        read.append(source)
        return checkpoint_fingerprint(source)

    monkeypatch.setattr(module, "checkpoint_fingerprint", noting)
    return read


def test_a_checkpoint_is_read_once(tmp_path, monkeypatch, sharded):
    memory, read = tmp_path / "memory", counting(monkeypatch)
    whole = settled(saved(tmp_path / "whole", a=torch.arange(6.0)))
    for file in sharded.glob("*.safetensors"):
        settled(str(sharded), file=file.name)
    for source in (whole, str(sharded)):
        found = {remembered_fingerprint(source, memory) for _ in range(3)}
        assert found == {checkpoint_fingerprint(source)}
    assert read == [whole, str(sharded)]
    monkeypatch.chdir(tmp_path)
    assert remembered_fingerprint("whole", memory) == remembered_fingerprint(whole, memory)
    assert len(read) == 2 and sum(path.stat().st_size for path in memory.iterdir()) == 128


def test_a_file_that_changed_is_read_again(tmp_path, monkeypatch):
    memory, read = tmp_path / "memory", counting(monkeypatch)
    source = settled(saved(tmp_path / "a", a=torch.arange(6.0)))
    first = remembered_fingerprint(source, memory)
    save_file({"a": torch.arange(6.0) + 1}, tmp_path / "a/model.safetensors")  # of the same size
    settled(source, 50.0)
    second = remembered_fingerprint(source, memory)
    save_file({"a": torch.arange(7.0)}, tmp_path / "a/model.safetensors")
    settled(source, 50.0)
    third = remembered_fingerprint(source, memory)
    assert len({first, second, third}) == 3 and len(read) == 3
    assert third == checkpoint_fingerprint(source)


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path, monkeypatch):
    memory, read = tmp_path / "memory", counting(monkeypatch)
    source = saved(tmp_path / "a", a=torch.arange(6.0))
    for _ in range(2):
        assert remembered_fingerprint(source, memory) == checkpoint_fingerprint(source)
    assert len(read) == 2 and not memory.exists()


def test_a_memory_that_is_damaged_or_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    memory, source = tmp_path / "memory", settled(saved(tmp_path / "a", a=torch.arange(6.0)))
    wanted = remembered_fingerprint(source, memory)
    (note,) = memory.iterdir()
    for broken in (b"", b"0" * 63, b"\xff" * 64, wanted.encode() + b"\n"):
        note.write_bytes(broken)
        assert remembered_fingerprint(source, memory) == wanted and note.read_text() == wanted
    (tmp_path / "file").touch()
    assert remembered_fingerprint(source, tmp_path / "file" / "memory") == wanted
    refusal(lambda source: remembered_fingerprint(source, memory), str(tmp_path / "none"))
