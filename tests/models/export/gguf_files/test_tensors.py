from __future__ import annotations

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.export.gguf_files.tensors import gguf_tensors, head_width, interleave, rope_factors
from tests.conftest import tiny_llama
from tests.models.export.test_mixture import LLAMA3
from tests.support.tiny_gguf import _tensors
from tests.support.tiny_moes import tiny_moe


def test_a_dense_llama_has_the_tensors_that_the_converter_of_llama_cpp_writes():
    model = tiny_llama()
    found = {each.name: each.values.numpy() for each in gguf_tensors(model, interleaved=True)}
    expected = _tensors(model)
    assert set(found) == set(expected)
    assert all((found[name] == expected[name]).all() for name in expected)


def test_rotary_halves_are_interleaved_in_each_head():
    rows = torch.arange(8.0)[:, None].expand(-1, 3)
    assert interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleave(rows[:, 0], 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_experts_are_stored_as_three_tensors():
    model = tiny_moe("mixtral")
    found = {each.name: each.values for each in gguf_tensors(model, interleaved=True)}
    experts = model.model.layers[1].mlp.experts
    assert torch.equal(found["blk.1.ffn_gate_exps.weight"], experts.gate_up_proj[:, :24])
    assert torch.equal(found["blk.1.ffn_up_exps.weight"], experts.gate_up_proj[:, 24:])
    assert torch.equal(found["blk.1.ffn_down_exps.weight"], experts.down_proj)
    assert torch.equal(found["blk.1.ffn_gate_inp.weight"], model.model.layers[1].mlp.gate.weight)


def test_qwen_keeps_its_rows_and_stores_the_shared_gate_as_a_vector():
    model = tiny_moe("qwen2_moe")
    found = {each.name: each.values for each in gguf_tensors(model, interleaved=False)}
    layer = model.model.layers[0]
    assert torch.equal(found["blk.0.attn_q.weight"], layer.self_attn.q_proj.weight)
    assert torch.equal(found["blk.0.attn_k.bias"], layer.self_attn.k_proj.bias)
    assert torch.equal(found["blk.0.ffn_gate_inp_shexp.weight"], layer.mlp.shared_expert_gate.weight[0])
    assert torch.equal(found["blk.0.ffn_down_shexp.weight"], layer.mlp.shared_expert.down_proj.weight)


def test_heads_have_their_own_width_or_a_part_of_the_hidden_width():
    assert head_width(tiny_llama(head_dim=16).config) == 16
    assert head_width(tiny_moe("qwen2_moe").config) == 8  # no head_dim: width 32, 4 heads


def test_rope_factors_give_the_frequencies_of_transformers():
    config = tiny_llama(rope_parameters=LLAMA3).config
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = 1.0 / 5e5 ** (torch.arange(0, 8, 2, dtype=torch.float32) / 8)
    torch.testing.assert_close(plain / rope_factors(config), expected, rtol=1e-5, atol=0)
    assert rope_factors(tiny_llama().config) is None


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="block_sparse_moe"):
        list(gguf_tensors(tiny_moe("granitemoe"), interleaved=True))
