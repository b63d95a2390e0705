from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.remote_code.dense_path_fedgraft import run_wide, wide_is_faster
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from tests.models.remote_code.test_execution_fedgraft import gradients_of, plain_sum, random_case

BIG = {"tokens": 256, "experts": 64, "edges": 0, "shape": (24, 576), "dtype": torch.float32}


def _wide(chosen, edges, inputs, held, act_fn: nn.Module) -> torch.Tensor:
    x, weights, gain, gate_up, down = inputs
    pairs = [tuple(edge) for edge in edges.nonzero().tolist()]
    return run_wide(x, weights, chosen, gain, pairs, gate_up, down, act_fn, held)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 6),
    experts=st.integers(1, 6),
    visits=st.integers(1, 6),
    held=st.lists(st.integers(0, 5), unique=True),
    linked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_output_and_gradients_are_the_plain_sums(tokens, experts, visits, held, linked, seed):
    held = [expert for expert in held if expert < experts] or [0]
    chosen, edges, inputs, held = random_case(tokens, experts, min(visits, experts), held, seed=seed)
    case, act_fn = (chosen, edges & linked, inputs, held), nn.GELU(approximate="tanh")
    expected, found = plain_sum(*case, act_fn), _wide(*case, act_fn)
    torch.testing.assert_close(found, expected)
    d_result = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(
        gradients_of(found, inputs, d_result), gradients_of(expected, inputs, d_result)
    )


def test_small_experts_run_wide_and_large_ones_by_their_rows():
    assert wide_is_faster(visits=256 * 32, **BIG)
    assert not wide_is_faster(visits=256 * 8, **BIG)
    assert not wide_is_faster(visits=256 * 8, **BIG | {"experts": 16, "shape": (96, 576)})
    assert wide_is_faster(
        visits=256 * 8, **BIG | {"experts": 16, "shape": (96, 576), "dtype": torch.bfloat16}
    )
    assert not wide_is_faster(visits=256 * 32, **BIG | {"edges": 252})
    assert wide_is_faster(visits=2048 * 32, **BIG | {"edges": 252, "tokens": 2048})


@pytest.mark.parametrize("neurons", [1, 1000])
def test_experts_that_all_tokens_visit_run_wide_whatever_their_size(neurons):
    assert wide_is_faster(tokens=5, visits=20, experts=4, edges=0, shape=(neurons, 8), dtype=torch.float32)


def _layer(visits: int, *, affinity: float = 0.0) -> ExpertGraphMLP:
    torch.manual_seed(0)
    layer = ExpertGraphMLP(hidden_size=8, expert_size=3, num_experts=6, num_visits=visits)
    for weight in (layer.gate_up_proj, layer.down_proj, layer.router.weight, layer.output_gain):
        nn.init.normal_(weight)
    layer.edges |= torch.ones(6, 6, dtype=torch.bool).triu(1)
    nn.init.normal_(layer.edge_affinity, std=affinity)
    return layer


@pytest.mark.parametrize("affinity", [0.0, 1.0])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("visits", [2, 6])
def test_a_layer_computes_the_same_either_way(monkeypatch, tokens, visits, affinity):
    layer, x = _layer(visits, affinity=affinity), torch.randn(tokens, 8)
    results = []
    for wide in (True, False):
        monkeypatch.setattr("models.remote_code.weights_fedgraft.wide_is_faster", lambda wide=wide, **_: wide)
        with torch.no_grad():
            results.append(layer(x))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_an_expert_that_is_not_held_is_refused_either_way(monkeypatch):
    layer = _layer(3)
    layer.hold([0, 2], layer.gate_up_proj[[0, 2]].detach(), layer.down_proj[[0, 2]].detach())
    chosen = torch.tensor([[0, 2, -1], [2, 4, 0]])
    for wide in (True, False):
        monkeypatch.setattr("models.remote_code.weights_fedgraft.wide_is_faster", lambda wide=wide, **_: wide)
        with pytest.raises(ValueError, match="does not hold expert 4"):
            layer.run_experts(
                torch.randn(2, 8), torch.ones(2, 3), chosen, layer.edge_gain, torch.zeros(6, 6).bool()
            )


def test_under_autocast_the_result_keeps_the_input_dtype():
    chosen, edges, inputs, held = random_case(7, 4, 2)
    case = chosen, edges, [each.detach().float() for each in inputs], held
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _wide(*case, nn.SiLU())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, _wide(*case, nn.SiLU()), rtol=0.05, atol=0.5)
