from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from configs.errors import UserError
from models.export.plain_model import plain_model, shared_settings
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of


def _config(graph):
    return MixtralConfig(**shared_settings(graph), intermediate_size=8, num_local_experts=2, head_dim=8)


def test_settings_are_those_of_the_graph():
    graph = graph_of(tiny_llama(rms_norm_eps=1e-3, max_position_embeddings=77))
    settings = shared_settings(graph)
    for key, value in settings.items():
        assert getattr(graph.config, key) == value
    assert settings["rms_norm_eps"] == 1e-3 and settings["max_position_embeddings"] == 77
    assert settings["rope_parameters"] is not graph.config.rope_parameters


@pytest.mark.parametrize("tied", [False, True])
def test_everything_but_the_ffns_is_taken_over_in_the_dtype_of_the_graph(tied):
    graph = graph_of(tiny_llama(tie_word_embeddings=tied)).to(torch.bfloat16)
    model = plain_model(graph, MixtralForCausalLM, _config(graph))
    assert model.dtype == torch.bfloat16 and model.config.dtype == torch.bfloat16
    found = model.state_dict()
    same = {name: value for name, value in graph.state_dict().items() if ".mlp." not in name}
    assert len(same) > 10 and all(torch.equal(found[name], value) for name, value in same.items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.generation_config.eos_token_id == graph.generation_config.eos_token_id


def test_a_bias_without_a_place_is_refused_unless_it_is_zero():
    graph = graph_of(tiny_llama(attention_bias=True))
    for layer in graph.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer.self_attn, name).bias.data.zero_()
    plain_model(graph, MixtralForCausalLM, _config(graph))
    graph.model.layers[1].self_attn.k_proj.bias.data[2] = 1
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.k_proj\.bias.*another format"):
        plain_model(graph, MixtralForCausalLM, _config(graph))
