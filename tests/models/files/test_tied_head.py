from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.files.safetensors_files import stored_tensors
from models.files.tied_head import has_own_head, record_own_head, stored_config
from tests.conftest import tiny_llama
from tests.support.own_head import own_head, save_with_own_head


@pytest.fixture
def folder(tmp_path, tiny_tokenizer) -> Path:
    return save_with_own_head(tmp_path / "own", tiny_tokenizer)


def tensors_of(folder: Path) -> dict:
    return {tensor.name: tensor for tensor in stored_tensors(folder / "model.safetensors")}


def test_the_stored_values_decide_about_the_tie(folder):
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert has_own_head(tensors_of(folder)) and stored_config(str(folder)).tie_word_embeddings is False
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert not has_own_head(tensors_of(folder)) and stored_config(str(folder)).tie_word_embeddings is True
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert has_own_head(tensors_of(folder))
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert has_own_head(tensors_of(folder))


def test_without_a_stored_head_the_configuration_stands(tmp_path, tiny_llama_dir):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    assert stored_config(str(tmp_path / "tied")).tie_word_embeddings is True
    assert stored_config(str(tiny_llama_dir)).tie_word_embeddings is False
    assert not has_own_head(tensors_of(tmp_path / "tied"))


def test_the_configuration_of_a_loaded_model_says_what_was_loaded():
    model = tiny_llama(tie_word_embeddings=True)
    record_own_head(model)
    assert model.config.tie_word_embeddings is True
    model.lm_head.weight = torch.nn.Parameter(own_head())
    record_own_head(model)
    assert model.config.tie_word_embeddings is False
