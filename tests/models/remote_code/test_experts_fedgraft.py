from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.remote_code.experts_fedgraft import ExpertGraphMLP
from tests.support.reference_walk import Layer, layer_tokens

WIDTH, NEURONS = 3, 2


def random_layer(
    num_experts: int,
    visits: int,
    *,
    seed: int = 0,
    order: str = "best-first",
    edges: float = 0.5,
    roots: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> ExpertGraphMLP:
    """A layer of random weights, gains, affinities and edges; ``edges`` and ``roots`` are shares."""
    layer = ExpertGraphMLP(
        hidden_size=WIDTH, expert_size=NEURONS, num_experts=num_experts, num_visits=visits, order=order
    ).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        open_edges = torch.rand(num_experts, num_experts, generator=generator) < edges
        open_roots = torch.rand(num_experts, generator=generator) < roots
        layer.edges.copy_(open_edges.triu(1) | open_roots.diag())
    return layer


def reference_of(layer: ExpertGraphMLP) -> Layer:
    gate, up = (part.detach().double().numpy() for part in layer.gate_up_proj.chunk(2, 1))
    plain = [
        value.detach().double().numpy()
        for value in (layer.router.weight, layer.edge_gain, layer.edge_affinity, layer.output_gain)
    ]
    router, edge_gain, edge_affinity, output_gain = plain
    return Layer(
        gate=gate,
        up=up,
        down=layer.down_proj.detach().double().transpose(1, 2).numpy(),
        router=router,
        mask=layer.edges.numpy(),
        edge_gain=edge_gain,
        edge_affinity=edge_affinity,
        output_gain=output_gain,
    )


def reference_output(layer: ExpertGraphMLP, x: torch.Tensor) -> torch.Tensor:
    resident = np.ones(layer.num_experts, dtype=bool) if layer.resident is None else layer.resident.numpy()
    rows = layer_tokens(
        x.detach().double().numpy(), reference_of(layer), resident, layer.num_visits, layer.order
    )
    return torch.from_numpy(rows)


def tokens(count: int, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


@settings(max_examples=120, deadline=None)
@given(
    num_experts=st.integers(1, 7),
    visits=st.integers(1, 7),
    seed=st.integers(0, 10_000),
    order=st.sampled_from(["best-first", "depth-first"]),
    edges=st.sampled_from([0.0, 0.4, 1.0]),
    roots=st.sampled_from([0.3, 1.0]),
    held=st.sampled_from([None, 0.0, 0.6]),
    trains=st.booleans(),
)
def test_the_layer_computes_what_the_reference_computes(
    num_experts, visits, seed, order, edges, roots, held, trains
):
    layer = random_layer(num_experts, visits, seed=seed, order=order, edges=edges, roots=roots)
    if held is not None:
        generator = torch.Generator().manual_seed(seed + 1)
        layer.resident = torch.rand(num_experts, generator=generator) < held
    x = tokens(5, seed=seed)
    with torch.set_grad_enabled(trains):
        output = layer(x)
    torch.testing.assert_close(output, reference_output(layer, x), rtol=1e-9, atol=1e-9)


def test_fp32_and_untouched_gains_agree_with_the_reference():
    layer = random_layer(6, 4, seed=3, dtype=torch.float32)
    x = tokens(40, dtype=torch.float32)
    torch.testing.assert_close(layer(x).double(), reference_output(layer, x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for gain in (layer.edge_gain, layer.edge_affinity, layer.output_gain):
            gain.zero_()
        torch.testing.assert_close(layer(x).double(), reference_output(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trains", [False, True])
def test_no_token_is_no_work_whatever_the_edges(trains):
    for edges in (0.0, 1.0):
        layer = random_layer(4, 2, edges=edges)
        with torch.set_grad_enabled(trains):
            assert layer(torch.zeros(2, 0, WIDTH, dtype=torch.float64)).shape == (2, 0, WIDTH)


def test_fewer_reachable_experts_than_visits_and_none_at_all():
    layer = random_layer(5, 5, edges=0.0)
    x = tokens(6)
    layer.edges.copy_(torch.tensor([True, False, True, False, False]).diag())
    torch.testing.assert_close(layer(x), reference_output(layer, x))
    layer.edges.zero_()
    assert torch.equal(layer(x), torch.zeros_like(x))


def test_leading_dimensions_are_kept_and_tokens_do_not_touch_each_other():
    layer = random_layer(5, 3)
    x = tokens(12)
    torch.testing.assert_close(
        layer(x.view(2, 6, WIDTH)), torch.stack([layer(x[i]) for i in range(12)]).view(2, 6, WIDTH)
    )


def test_one_expert_is_the_plain_gated_ffn_with_its_output_weight():
    layer = random_layer(1, 1)
    x = tokens(4)
    gate, up = (x @ layer.gate_up_proj[0].T).chunk(2, -1)
    plain = (torch.nn.functional.silu(gate) * up) @ layer.down_proj[0].T
    torch.testing.assert_close(layer(x), (1 + layer.output_gain[0]) * plain)


@pytest.mark.parametrize("order", ["best-first", "depth-first"])
def test_gradients_of_every_parameter_and_of_the_input(order):
    layer = random_layer(4, 3, seed=5, order=order, edges=1.0)
    x = tokens(3).requires_grad_()
    names, values = zip(*layer.named_parameters(), strict=True)
    assert set(names) == {
        "gate_up_proj",
        "down_proj",
        "router.weight",
        "edge_gain",
        "edge_affinity",
        "output_gain",
    }

    def run(inputs, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (inputs,))

    assert torch.autograd.gradcheck(run, (x, *values))
    run(x, *values).square().sum().backward()
    for name, value in zip(names, values, strict=True):
        assert value.grad is not None and value.grad.abs().sum() > 0, name


def test_edge_gains_that_start_at_zero_receive_a_gradient_and_cost_nothing_without_training():
    layer = random_layer(4, 4, edges=1.0)
    with torch.no_grad():
        layer.edge_gain.zero_()
    layer(tokens(8)).square().sum().backward()
    assert (layer.edge_gain.grad.triu(1)[layer.edges.triu(1)] != 0).all()
    assert torch.equal(layer.edge_gain.grad.tril(), torch.zeros(4, 4, dtype=torch.float64))
    with torch.no_grad():
        assert not layer._passing_edges().any()
    layer.edge_gain.requires_grad_(False)
    assert not layer._passing_edges().any()


def test_the_runner_up_changes_nothing_forward_and_the_gate_learns_on_both_sides():
    layer = random_layer(6, 2, seed=8, edges=0.5)
    layer.resident = torch.tensor([True, False, True, False, True, False])
    x = tokens(50)
    plain = layer(x).detach()
    layer.residency_gate = layer.resident.double().requires_grad_()
    gated = layer(x)
    torch.testing.assert_close(gated, plain)
    gated.square().sum().backward()
    assert (layer.residency_gate.grad != 0).all()
    layer.residency_gate = torch.full((6,), 0.5, dtype=torch.float64)
    assert not torch.allclose(layer(x), plain)


def test_the_gate_also_works_where_everyone_is_resident_and_where_nobody_is():
    layer = random_layer(4, 2, seed=9)
    x = tokens(5)
    plain = layer(x).detach()
    for resident in (None, torch.ones(4, dtype=torch.bool)):
        layer.resident, layer.residency_gate = resident, torch.ones(4, dtype=torch.float64)
        torch.testing.assert_close(layer(x), plain)
    layer.resident, layer.residency_gate = torch.zeros(4, dtype=torch.bool), torch.zeros(
        4, dtype=torch.float64
    )
    assert torch.equal(layer(x), torch.zeros_like(x))


def test_the_observer_sees_scores_walk_and_weights():
    layer, seen = random_layer(5, 3, edges=1.0), []
    layer.observers = [lambda *what: seen.append(what)] * 2
    x = tokens(7)
    layer(x)
    (who, scores, walk, weights), second = seen
    assert second[1] is scores
    assert who is layer and walk.experts_TK.shape == weights.shape == (7, 3)
    torch.testing.assert_close(scores, x @ layer.router.weight.T)
    share = torch.softmax(walk.scores_TK, -1)
    torch.testing.assert_close(weights, 1 + layer.output_gain[walk.experts_TK] * share)
    assert scores.requires_grad and not weights.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused_and_the_layer_is_named(bad):
    layer = ExpertGraphMLP(hidden_size=WIDTH, expert_size=2, num_experts=2, num_visits=1, layer_index=7)
    torch.nn.init.ones_(layer.router.weight)
    with pytest.raises(FloatingPointError, match="layer 7"):
        layer(torch.tensor([[0.0, bad, 0.0]]))


def test_bf16_experts_are_routed_in_fp32():
    layer = random_layer(5, 2, dtype=torch.bfloat16)
    layer.router.weight.data = layer.router.weight.data.float() + 1e-4
    x = tokens(9, dtype=torch.bfloat16)
    torch.testing.assert_close(layer.router(x), x.float() @ layer.router.weight.T)
    assert layer(x).dtype == torch.bfloat16
