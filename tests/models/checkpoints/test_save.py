from __future__ import annotations

import json

import pytest
import torch

from models.checkpoints.load import load_causal_lm
from models.checkpoints.save import cast_weights, save_checkpoint
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, random_ids


def test_a_checkpoint_carries_its_code_and_its_tokenizer(tmp_path, tiny_tokenizer):
    save_checkpoint(graph_of(), tiny_tokenizer, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "configuration_fedgraft.py",
        "experts_fedgraft.py",
        "modeling_fedgraft.py",
        "routing_fedgraft.py",
    } <= names


def test_graphs_and_dense_models_open_in_transformers_4_and_5(tmp_path, tiny_tokenizer):
    rope = {"rope_theta": 5e4, "rope_type": "linear", "factor": 2.0}
    dense = tiny_llama(rope_parameters=rope).to(torch.bfloat16)
    graph = cast_weights(graph_of(dense.float()), torch.bfloat16)
    for name, model in (("graph", graph), ("dense", dense.to(torch.bfloat16))):
        (tmp_path / name).mkdir()
        save_checkpoint(model, tiny_tokenizer, tmp_path / name)
        values = json.loads((tmp_path / name / "config.json").read_text())
        assert values["rope_parameters"] == rope and values["dtype"] == values["torch_dtype"] == "bfloat16"
        assert (values["rope_theta"], values["rope_scaling"]) == (5e4, {"rope_type": "linear", "factor": 2.0})
        assert load_causal_lm(str(tmp_path / name)).config.rope_parameters == rope


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casting_leaves_what_routes_in_fp32(dtype):
    model = cast_weights(graph_of(), dtype)
    exact = ("router.weight", "edge_gain", "edge_affinity", "output_gain")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(exact) else dtype), name
    for layer in model.expert_layers():
        assert layer.edges.dtype == torch.bool and layer.neurons.dtype == torch.int64
    assert model.config.dtype == dtype == model.dtype
    assert torch.isfinite(model(input_ids=random_ids(model)).logits).all()


def test_tied_embeddings_stay_tied_when_cast():
    model = cast_weights(graph_of(tiny_llama(tie_word_embeddings=True)), torch.bfloat16)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
