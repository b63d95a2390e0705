from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.remote_code.dispatch_fedgraft import dispatch, find_links
from models.remote_code.execution_fedgraft import FusedExperts, gated_ffn, run_visits

WIDTH, NEURONS = 5, 3


def random_case(tokens: int, experts: int, visits: int, held: list[int] | None = None, *, seed: int = 0):
    """Everything that running a layer takes: random experts without repetition, some visits unmade, half the edges."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    held = list(range(experts)) if held is None else held
    scores = torch.rand(tokens, experts, generator=generator)
    scores[:, [expert for expert in range(experts) if expert not in held]] = -1
    best = scores.topk(visits, -1)
    chosen = torch.where(best.values > 0.2, best.indices, -1)
    edges = (torch.rand(experts, experts, generator=generator) < 0.5).triu(1)
    inputs = [normal(tokens, WIDTH), normal(tokens, visits), normal(experts, experts)]
    inputs += [normal(len(held), 2 * NEURONS, WIDTH), normal(len(held), WIDTH, NEURONS)]
    return chosen, edges, inputs, held


def run_both(chosen, edges, inputs, held, act_fn: nn.Module):
    visits = dispatch(chosen, len(edges))
    links = find_links(visits, edges, len(chosen))
    x, weights, gain, gate_up, down = inputs

    def run(expert: int, rows: torch.Tensor) -> torch.Tensor:
        row = held.index(expert)
        return gated_ffn(act_fn, rows, gate_up[row], down[row])

    yield FusedExperts.apply(x, weights, gain, gate_up, down, visits, links, act_fn, held)
    yield run_visits(x, weights, gain, visits, links, run)


def plain_sum(chosen, edges, inputs, held, act_fn: nn.Module) -> torch.Tensor:
    """Token by token, expert by expert."""
    x, weights, gain, gate_up, down = inputs
    result = torch.zeros_like(x)
    for token, visited in enumerate(chosen.tolist()):
        outputs: dict[int, torch.Tensor] = {}
        for expert in sorted(expert for expert in visited if expert >= 0):
            row = x[token] + sum(gain[p, expert] * outputs[p] for p in outputs if edges[p, expert])
            outputs[expert] = gated_ffn(act_fn, row, gate_up[held.index(expert)], down[held.index(expert)])
        for place, expert in enumerate(visited):
            if expert >= 0:
                result[token] = result[token] + weights[token, place] * outputs[expert]
    return result


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 6),
    experts=st.integers(1, 6),
    visits=st.integers(1, 6),
    held=st.lists(st.integers(0, 5), unique=True),
    seed=st.integers(0, 1000),
)
def test_both_ways_compute_the_plain_sum_and_its_gradients(tokens, experts, visits, held, seed):
    held = [expert for expert in held if expert < experts] or [0]
    case = random_case(tokens, experts, min(visits, experts), held, seed=seed)
    act_fn = nn.GELU(approximate="tanh")
    expected = plain_sum(*case, act_fn)
    d_result = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = gradients_of(expected, case[2], d_result)
    for result in run_both(*case, act_fn):
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(gradients_of(result, case[2], d_result), gradients)


def gradients_of(
    result: torch.Tensor, inputs: list[torch.Tensor], d_result: torch.Tensor
) -> list[torch.Tensor]:
    """Zeros for an input that the result does not depend on."""
    if not result.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = torch.autograd.grad(result, inputs, d_result, allow_unused=True)
    return [torch.zeros_like(t) if grad is None else grad for t, grad in zip(inputs, found, strict=True)]


def test_gradients_are_made_only_where_they_are_asked_for():
    chosen, edges, inputs, held = random_case(12, 4, 3)
    complete = torch.autograd.grad(next(run_both(chosen, edges, inputs, held, nn.SiLU())).sum(), inputs)
    for wanted in range(5):
        alone = [tensor.detach().requires_grad_(index == wanted) for index, tensor in enumerate(inputs)]
        next(run_both(chosen, edges, alone, held, nn.SiLU())).sum().backward()
        assert [tensor.grad is not None for tensor in alone] == [index == wanted for index in range(5)]
        torch.testing.assert_close(alone[wanted].grad, complete[wanted])


def test_experts_that_nobody_visits_get_a_gradient_of_zero():
    chosen, edges, inputs, held = random_case(3, 6, 1)
    idle = [expert for expert in range(6) if expert not in chosen]
    assert idle
    next(run_both(chosen, edges, inputs, held, nn.SiLU())).sum().backward()
    for weight in inputs[3:]:
        assert not weight.grad[idle].any() and weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_bf16_and_gives_gradients_in_the_dtype_of_the_weights(dtype):
    chosen, edges, inputs, held = random_case(64, 4, 2)
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = next(run_both(chosen, edges, exact, held, nn.SiLU()))
    expected.square().sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = next(run_both(chosen, edges, inputs, held, nn.SiLU()))
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, rtol=0.1, atol=0.3)
    result.float().square().sum().backward()
    for got, want in zip(inputs, exact, strict=True):
        assert got.grad.dtype == dtype
        assert (got.grad.float() - want.grad).norm() < 0.05 * want.grad.norm()


def test_a_second_run_gives_the_same_bits():
    case = random_case(200, 6, 4, seed=7)
    first, second = (next(run_both(*case, nn.SiLU())) for _ in range(2))
    assert torch.equal(first, second)
    for one, other in zip(*(torch.autograd.grad(run.sum(), case[2]) for run in (first, second)), strict=True):
        assert torch.equal(one, other)
