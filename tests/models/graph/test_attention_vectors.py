from __future__ import annotations

import pytest
import torch

from models.checkpoints.save import cast_weights
from models.graph.attention_vectors import (
    attention_count,
    flatten_projections,
    projections,
    quantize_attention,
    read_attention,
    write_attention,
)
from models.graph.unit_vectors import OTHERS, add_to_unit
from models.runtime.nf4_linear import NF4Linear
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, logit_difference, random_ids

SIZE = 32 * 32 + 2 * 16 * 32 + 32 * 32  # two of four heads for keys and values


def attention_of(model, layer: int) -> list[torch.Tensor]:
    attention = model.model.layers[layer].self_attn
    return [getattr(attention, f"{name}_proj").weight for name in "qkvo"]


def test_the_vector_is_laid_out_as_documented():
    model = graph_of()
    assert attention_count(model, 0) == attention_count(model, 1) == SIZE
    vector = read_attention(model, 1)
    assert torch.equal(vector, torch.cat([weight.flatten() for weight in attention_of(model, 1)]))
    assert vector.dtype == torch.float32 and not vector.requires_grad
    vector.zero_()
    assert read_attention(model, 1).any()
    assert len(projections(model, 0)) == 4
    assert (
        flatten_projections([torch.ones(2, 2).bfloat16(), torch.zeros(1, 3)]).tolist()
        == [1.0] * 4 + [0.0] * 3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_again_and_nothing_else_moves(dtype):
    model = cast_weights(graph_of(), dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vector = torch.randint(-100, 100, (SIZE,), generator=torch.Generator().manual_seed(0)).float()
    write_attention(model, 1, vector)
    assert torch.equal(read_attention(model, 1), vector)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"}


def test_a_step_is_added_in_fp32():
    model = cast_weights(graph_of(), torch.bfloat16)
    start, step = read_attention(model, 0), torch.full((SIZE,), 1 / 3)
    add_to_unit(model, (0, OTHERS), step)
    assert torch.equal(read_attention(model, 0), (start + step).bfloat16().float())


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 0])
def test_a_vector_of_another_size_is_refused(size):
    model = graph_of()
    before = read_attention(model, 0)
    with pytest.raises(ValueError, match=f"attention of layer 0: expected {SIZE} entries, got {size}"):
        write_attention(model, 0, torch.zeros(size))
    assert torch.equal(read_attention(model, 0), before)


def test_attention_is_quantized_in_place():
    model, ids = graph_of(), random_ids(tiny_llama())
    start = [read_attention(model, layer) for layer in range(2)]
    quantize_attention(model, torch.float32)
    for layer in range(2):
        assert all(type(linear) is NF4Linear for linear in projections(model, layer))
        assert attention_count(model, layer) == SIZE
        error = (read_attention(model, layer) - start[layer]).norm() / start[layer].norm()
        assert 0.05 < error < 0.12
    dequantized = graph_of()
    for layer in range(2):
        write_attention(dequantized, layer, read_attention(model, layer))
    assert logit_difference(model, dequantized, ids) < 1e-4


def test_quantized_attention_cannot_be_moved():
    model = graph_of()
    quantize_attention(model, torch.float32)
    with pytest.raises(ValueError, match="before it is quantized"):
        add_to_unit(model, (1, OTHERS), torch.zeros(SIZE))


def test_biases_of_attention_are_kept():
    dense = tiny_llama(attention_bias=True)
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.self_attn.v_proj.bias.fill_(0.5)
    model = graph_of(dense)
    quantize_attention(model, torch.float32)
    assert all(float(layer.self_attn.v_proj.bias.mean()) == 0.5 for layer in model.model.layers)
    assert torch.isfinite(model(input_ids=random_ids(dense)).logits).all()
