from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.errors import UserError
from models.checkpoints.convert import as_checkpoint, convert
from tests.conftest import tiny_llama
from tests.support.tiny_gguf import TOKENS, write_gguf

IDS = torch.arange(32).view(2, 16)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FEDGRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path) -> Path:
    write_gguf(tiny_llama(), tmp_path / "Tiny.GGUF")
    return tmp_path / "Tiny.GGUF"


@pytest.fixture
def bin_folder(tmp_path, tiny_llama_dir) -> Path:
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "bin"))
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    return folder


@torch.no_grad()
def logits(source: str) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(source)(IDS).logits


@torch.no_grad()
def expected() -> torch.Tensor:
    return tiny_llama()(IDS).logits


def test_a_gguf_file_gives_the_logits_of_the_model_it_holds(cache, gguf_file):
    source = as_checkpoint(str(gguf_file))
    assert Path(source).parent == cache / "converted"
    torch.testing.assert_close(logits(source), expected(), rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert tokenizer.bos_token == "<s>" and tokenizer.eos_token == "</s>"
    assert tokenizer.convert_tokens_to_ids(TOKENS) == list(range(64))


def test_a_folder_with_one_gguf_file_is_that_file(cache, gguf_file, tmp_path):
    (tmp_path / "only").mkdir()
    gguf_file.rename(tmp_path / "only" / "model.gguf")
    torch.testing.assert_close(logits(as_checkpoint(str(tmp_path / "only"))), expected(), rtol=0, atol=1e-5)
    shutil.copy(tmp_path / "only" / "model.gguf", tmp_path / "only" / "other.gguf")
    with pytest.raises(UserError, match="one GGUF file in .*got 2"):
        as_checkpoint(str(tmp_path / "only"))


def test_bin_weights_are_written_as_safetensors(cache, bin_folder):
    source = as_checkpoint(str(bin_folder))
    assert torch.equal(logits(source), expected())
    with safe_open(Path(source) / "model.safetensors", framework="pt") as file:
        assert len(list(file.keys())) == len(tiny_llama().state_dict())


def test_a_conversion_is_made_once_and_again_for_a_changed_file(cache, bin_folder):
    first = as_checkpoint(str(bin_folder))
    written = (Path(first) / "model.safetensors").stat().st_mtime_ns
    assert as_checkpoint(str(bin_folder)) == first
    assert (Path(first) / "model.safetensors").stat().st_mtime_ns == written
    other = tiny_llama(initializer_range=0.1)
    torch.save(
        {name: value.half() for name, value in other.state_dict().items()}, bin_folder / "pytorch_model.bin"
    )
    assert as_checkpoint(str(bin_folder)) != first


@pytest.mark.parametrize("source", ["owner/model", "nowhere"])
def test_other_sources_stay_as_they_are(cache, source, tiny_llama_dir):
    assert as_checkpoint(source) == source and as_checkpoint(str(tiny_llama_dir)) == str(tiny_llama_dir)
    assert not cache.exists()


def test_files_that_cannot_be_read_are_refused_in_one_line(cache, tmp_path, gguf_file, bin_folder):
    (tmp_path / "cut.gguf").write_bytes(gguf_file.read_bytes()[:1000])
    (tmp_path / "text.gguf").write_text("no model")
    (bin_folder / "pytorch_model.bin").write_bytes(b"no model")
    for source in (tmp_path / "cut.gguf", tmp_path / "text.gguf", bin_folder):
        with pytest.raises(UserError, match=f"in {source}, got: ") as error:
            as_checkpoint(str(source))
        assert "\n" not in str(error.value)
    assert [path for path in (cache / "converted").iterdir() if path.is_dir()] == []


def test_convert_writes_where_it_is_told(cache, tmp_path, gguf_file, tiny_llama_dir):
    convert(str(gguf_file), tmp_path / "out")
    torch.testing.assert_close(logits(str(tmp_path / "out")), expected(), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="expected an empty output directory"):
        convert(str(gguf_file), tmp_path / "out")
    with pytest.raises(UserError, match="GGUF file or a folder with .bin weights"):
        convert(str(tiny_llama_dir), tmp_path / "other")


def test_without_the_package_the_extra_is_named(cache, gguf_file, monkeypatch):
    monkeypatch.setattr("models.checkpoints.convert.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="install.sh gguf"):
        as_checkpoint(str(gguf_file))


def test_too_little_room_for_the_weights_is_refused(tmp_path, gguf_file, little_room):
    with pytest.raises(UserError, match="MiB free"):
        convert(str(gguf_file), tmp_path / "out")
    assert not (tmp_path / "out").exists()
