from __future__ import annotations

import math

import pytest
import torch

from models.bootstrap import calibration as module
from models.bootstrap.build import BootstrapOptions, build_graph, plan_experts
from models.bootstrap.calibration import Calibration
from models.bootstrap.selection_report import (
    SHARES,
    NeuronSelection,
    active_count,
    add_router_perplexities,
    baseline_perplexities,
    linear_selection,
    select_neurons,
)
from models.graph.runtime_settings import visiting
from models.runtime.perplexity import evaluate_loss
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import ffn_inputs, random_ids

NAMES = {"router", "centroid", "static", "oracle", "random"}


@pytest.fixture(scope="module")
def made():
    """A dense model, its graph, the experts, calibration and held-out tokens."""
    dense = tiny_llama()
    calibration, held_out = random_ids(dense, 12, 40), random_ids(dense, 4, 40, seed=1)
    experts = plan_experts(dense, calibration, BootstrapOptions(num_experts=8))
    return dense, build_graph(dense, experts, 4), experts, calibration, (held_out, held_out)


def selection_report(dense, graph, experts, calibration, held_out, *, measured=None, on_step=lambda: None):
    """The whole report, of baselines and router."""
    measured = measured or Calibration(dense, calibration)
    report = baseline_perplexities(measured, experts, held_out, on_step=on_step)
    add_router_perplexities(report, graph, held_out, on_step=on_step)
    return report


@pytest.fixture(scope="module")
def report(made):
    return selection_report(*made)


def test_the_report_has_every_way_at_every_share(made, report):
    assert set(report) == {"dense", "75", "50", "25"} and SHARES == (75, 50, 25)
    assert all(set(report[str(share)]) == NAMES for share in SHARES)
    assert all(next(iter(report[str(share)])) == "router" for share in SHARES)
    assert all(math.isfinite(value) for share in SHARES for value in report[str(share)].values())
    assert report["dense"] == evaluate_loss(made[0], *made[4]).perplexity


def test_what_was_measured_before_is_not_measured_again(made, report, monkeypatch):
    dense, _, _, calibration, _ = made
    measured = Calibration(dense, calibration)
    assert measured.statistics and measured.metrics
    for name in ("neuron_statistics", "output_metrics"):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("measured again"))
    assert selection_report(*made, measured=measured) == report


def test_a_model_in_bf16_is_bootstrapped_and_reported_as_it_is(report):
    dense = tiny_llama().to(torch.bfloat16)
    calibration, held_out = random_ids(dense, 12, 40), random_ids(dense, 4, 40, seed=1)
    experts = plan_experts(dense, calibration, BootstrapOptions(num_experts=8))
    assert all(layer.router.dtype == torch.float32 for layer in experts)
    found = selection_report(
        dense, build_graph(dense, experts, 4), experts, calibration, (held_out, held_out)
    )
    assert found["dense"] == pytest.approx(report["dense"], rel=0.05)
    assert found["50"]["router"] == pytest.approx(report["50"]["router"], rel=0.1)


def test_each_evaluation_is_announced(made):
    steps = []
    selection_report(*made, on_step=lambda: steps.append(1))
    assert len(steps) == 1 + 5 * len(SHARES)


@pytest.mark.parametrize("share, active", [(75, 6), (50, 4), (25, 2)])
def test_the_router_column_is_the_dense_model_masked_by_the_same_router(made, report, share, active):
    dense, _, experts, _, held_out = made
    members = [torch.from_numpy(layer.clusters.members) for layer in experts]
    selection = linear_selection(members, [layer.router for layer in experts])
    assert active_count(8, share) == active
    with select_neurons(dense, selection, share):
        masked = evaluate_loss(dense, *held_out).perplexity
    assert report[str(share)]["router"] == pytest.approx(masked, rel=1e-5)


def test_the_static_column_keeps_the_neurons_of_largest_mean_contribution(made, report):
    dense, _, _, calibration, held_out = made
    pruned = tiny_llama()
    for layer in range(2):
        mlp, x = dense.model.layers[layer].mlp, ffn_inputs(dense, calibration, layer)
        with torch.no_grad():
            hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            mean = hidden.abs().mean(0) * mlp.down_proj.weight.norm(dim=0)
        dropped = mean.argsort()[:32]
        pruned.model.layers[layer].mlp.down_proj.weight.data[:, dropped] = 0
    expected = evaluate_loss(pruned, *held_out).perplexity
    assert report["50"]["static"] == pytest.approx(expected, rel=1e-5)


def test_all_neurons_selected_is_the_dense_model(made):
    dense, graph, experts, _, held_out = made
    members = [torch.from_numpy(layer.clusters.members) for layer in experts]
    selection = linear_selection(members, [layer.router for layer in experts])
    whole = evaluate_loss(dense, *held_out).perplexity
    with select_neurons(dense, selection, 100):
        assert evaluate_loss(dense, *held_out).perplexity == pytest.approx(whole, rel=1e-5)
    with visiting(graph, [active_count(8, 100)] * 2):
        assert evaluate_loss(graph, *held_out).perplexity == pytest.approx(whole, rel=1e-5)


def test_the_oracle_keeps_most_of_the_output_and_random_experts_the_least():
    """At half the experts, what the oracle leaves out of an FFN's output is less than what a random choice does."""
    dense = tiny_llama()
    experts = plan_experts(dense, random_ids(dense, 20, 40), BootstrapOptions(num_experts=8))
    x, mlp = ffn_inputs(dense, random_ids(dense, 5, 40, seed=2), 0), dense.model.layers[0].mlp
    members = torch.from_numpy(experts[0].clusters.members)
    noise = torch.randn(len(x), 8, generator=torch.Generator().manual_seed(0))

    def contribution(module, x_TD):
        hidden = module.act_fn(module.gate_proj(x_TD)) * module.up_proj(x_TD)
        return (hidden.abs() * module.down_proj.weight.norm(dim=0))[:, members].sum(-1)

    errors = {}
    with torch.no_grad():
        whole = mlp(x)
        for name, score in {"oracle": contribution, "noise": lambda module, x_TD: noise}.items():
            with select_neurons(dense, NeuronSelection([members] * 2, [score] * 2), 50):
                errors[name] = float((mlp(x) - whole).square().mean())
    assert errors["oracle"] < 0.8 * errors["noise"]


def test_the_dense_model_is_given_back_even_after_an_error(made):
    dense, _, experts, _, held_out = made
    whole = evaluate_loss(dense, *held_out).nll
    members = [torch.from_numpy(layer.clusters.members) for layer in experts]
    selection = linear_selection(members, [layer.router for layer in experts])
    with pytest.raises(RuntimeError), select_neurons(dense, selection, 25):
        assert evaluate_loss(dense, *held_out).nll != whole
        raise RuntimeError
    assert evaluate_loss(dense, *held_out).nll == whole


@pytest.mark.parametrize(
    "experts, share, active",
    [(16, 75, 12), (16, 25, 4), (4, 75, 3), (1, 25, 1), (3, 50, 2), (2, 25, 1), (5, 100, 5)],
)
def test_the_active_share_is_rounded_and_never_none(experts, share, active):
    assert active_count(experts, share) == active
