"""Compression plans: what goes, and that every figure is that of a model shrunk on its own."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from configs.errors import UserError
from experts.merging.alignment import average_experts
from experts.merging.similarity import jaccard, weight_cosines
from experts.saliency.ranks import rank_sums
from experts.selection.compression_trace import Removal
from experts.selection.expert_list import check_keep_map
from experts.selection.removal_candidates import RemovalCandidates
from experts.selection.rules import SelectionRules
from models.moe.expert_overlap import collect_overlap
from models.moe.planner import PlanOptions, plan_compression
from models.moe.remove import keep_experts, remove_experts
from models.moe.saliency_collection import collect_saliency
from models.moe.views import moe_layers
from models.runtime.perplexity import batches_loss
from tests.support.module_moe import with_module_experts
from tests.support.saliency_samples import map_of
from tests.support.tiny_graphs import graph_of, logit_difference, random_ids, with_random_gains
from tests.support.tiny_moes import FAMILIES, tiny_moe


def text(model, seed=0):
    token_mask = torch.ones(2, 12, dtype=torch.bool)
    token_mask[1, 8:] = False
    return [(random_ids(model, 2, 12, seed=seed + batch), token_mask) for batch in range(2)]


def perplexity(model):
    return batches_loss(model, text(model, seed=10)).perplexity


def moe_of(name):
    if name == "modules":
        return with_module_experts(tiny_moe("olmoe"))
    return graph_of(num_experts=4, visits=2) if name == "graph" else tiny_moe(name)


@torch.no_grad()
def likeness_to(model):
    """A measure: perplexity of what the model itself predicts, which no change can lower."""
    ids = random_ids(model, 4, 12, seed=10)
    wanted = model(input_ids=ids).logits.softmax(-1)

    def measure(other):
        return float((-wanted * other(input_ids=ids).logits.log_softmax(-1)).sum(-1).mean().exp())

    return measure


def plan(model, n, *, measure=perplexity, on_step=lambda *_: None, **options):
    names = ("metric", "alignment", "max_group_size")
    own = {name: options.pop(name) for name in names if name in options}
    selection = SelectionRules(n_prune=n, model_wide=True, **options)
    return plan_compression(model, text(model), measure, PlanOptions(selection, **own), on_step=on_step)


@pytest.fixture
def merges_only(monkeypatch):
    """No step prunes."""
    monkeypatch.setattr(RemovalCandidates, "to_prune", lambda self: None)


@pytest.mark.parametrize("family", [*FAMILIES, "graph", "modules"])
def test_pruning_follows_the_ranks_and_perplexities_are_those_of_pruned_models(family):
    model = moe_of(family)
    original = copy.deepcopy(model)
    ranks = rank_sums([collect_saliency(original, text(original))], "reap", model_wide=True)
    # Groups of one: no step merges.
    found = plan(model, 3, max_group_size=1)
    worst = np.argsort(-ranks, axis=None)[:3]
    assert [(step.removal.layer, step.removal.expert) for step in found.steps] == [
        divmod(int(place), ranks.shape[1]) for place in worst
    ]
    gone: set[tuple[int, int]] = set()
    before = perplexity(original)
    assert found.perplexity_before == before
    for step in found.steps:
        gone.add((step.removal.layer, step.removal.expert))
        kept = {
            layer: np.array([e for e in range(ranks.shape[1]) if (layer, e) not in gone])
            for layer in range(2)
        }
        shrunk = keep_experts(copy.deepcopy(original), kept)
        assert step.perplexity == pytest.approx(perplexity(shrunk), rel=1e-6)
        assert step.perplexity_loss == pytest.approx(step.perplexity - before, abs=1e-9)
        assert step.decoder_layer == moe_layers(original)[step.removal.layer].decoder
        assert step.saliency_rank == ranks[step.removal.layer, step.removal.expert]
        assert (step.weight_cosine, step.jaccard, step.other) == (None, None, None)
        before = step.perplexity
    # The model itself is what the plan leaves.
    assert logit_difference(model, shrunk, random_ids(model, 1, 12)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("alignment", ["none", "centroid"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "graph", "modules"])
def test_a_merge_is_the_average_of_the_most_alike_pair(family, alignment, merges_only):
    model = moe_of(family)
    expected = copy.deepcopy(model)
    saliency, visits = collect_overlap(expected, text(expected))
    ranks = rank_sums([saliency], "reap", model_wide=True)
    found = plan(model, 1, alignment=alignment)
    (step,) = found.steps
    layer, gone, into = step.removal.layer, step.removal.expert, step.removal.into
    pairs = {}
    for one in moe_layers(expected):
        experts = [one.read_numpy(expert) for expert in range(one.num_experts)]
        cosine, overlap = weight_cosines(experts, alignment), jaccard(visits[one.ordinal])
        for p in range(one.num_experts):
            for q in range(p):
                pairs[one.ordinal, p, q] = cosine[p, q], overlap[p, q]
    best = max(pairs, key=lambda pair: sum(pairs[pair]))
    assert best == (layer, max(gone, into), min(gone, into))
    assert (step.weight_cosine, step.jaccard) == pytest.approx(pairs[best])
    assert ranks[layer, gone] > ranks[layer, into] and step.saliency_rank == ranks[layer, gone]
    if alignment == "none":
        view = moe_layers(expected)[layer]
        average = average_experts(
            [view.read_numpy(e) for e in (into, gone)], saliency.reap_sum[layer, [into, gone]]
        )
        view.write(into, *map(torch.from_numpy, average))
        remove_experts(view, {gone: into})
        assert step.perplexity == pytest.approx(perplexity(expected), rel=1e-6)
        assert logit_difference(model, expected, random_ids(model, 1, 12)) < 1e-5


@torch.no_grad()
def test_a_chain_of_merges_is_the_average_of_the_group(merges_only):
    model = tiny_moe("mixtral")
    original = copy.deepcopy(model)
    saliency = collect_saliency(original, text(original))
    found = plan(model, 6, alignment="none")
    assert {layer.num_experts for layer in moe_layers(model)} == {1}
    for layer in moe_layers(original):
        shares = saliency.reap_sum[layer.ordinal]
        average = average_experts([layer.read_numpy(expert) for expert in range(4)], shares)
        for part, expected in zip(moe_layers(model)[layer.ordinal].read_numpy(0), average, strict=True):
            np.testing.assert_allclose(part, expected, atol=1e-6)
    check_keep_map(found.expert_list({}).keep_map, [4, 4])


@torch.no_grad()
def test_later_merges_compare_what_merged_experts_are_by_then(merges_only):
    model = tiny_moe("mixtral", num_hidden_layers=1, num_local_experts=3)
    original = copy.deepcopy(model)
    saliency, (visits,) = collect_overlap(original, text(original))
    first, second = plan(model, 2, alignment="none").steps
    (layer,), pair = moe_layers(original), [first.removal.into, first.removal.expert]
    merged = average_experts([layer.read_numpy(e) for e in pair], saliency.reap_sum[0, pair])
    other = 3 - sum(pair)
    cosine = weight_cosines([merged, layer.read_numpy(other)], "none")[0, 1]
    assert second.weight_cosine == pytest.approx(cosine, abs=1e-6)
    overlap = jaccard(np.stack([visits[pair[0]] | visits[pair[1]], visits[other]]))[0, 1]
    assert second.jaccard == pytest.approx(overlap)


@torch.no_grad()
def twins_of_top_one():
    """A Mixtral of one expert a token whose most salient experts are twins: other neuron order, nearly equal rows."""
    model = tiny_moe("mixtral", num_experts_per_tok=1)
    layer = moe_layers(model)[1]
    gate_up, down = (part.clone() for part in layer.read(2))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    layer.write(2, gate_up, 3 * down)
    layer.write(0, torch.cat([part[order] for part in gate_up.chunk(2)]), 3 * down[:, order])
    rows = layer.router_weight
    rows.data[0] = rows[2] + 1e-3 * torch.randn(32, generator=torch.Generator().manual_seed(2))
    return model


def test_twins_merge_first_at_no_loss():
    model = twins_of_top_one()
    found = plan(model, 1, measure=likeness_to(model))
    (step,) = found.steps
    assert {step.removal.expert, step.removal.into} == {0, 2} and step.removal.layer == 1
    assert step.weight_cosine == pytest.approx(1, abs=1e-5)
    assert step.perplexity_loss == pytest.approx(0, abs=1e-4)
    assert step.other is not None and step.other.into is None
    assert step.other_perplexity > found.perplexity_before + 1e-3


@torch.no_grad()
def without_down(model, ordinal, expert):
    layer = moe_layers(model)[ordinal]
    gate_up, down = layer.read(expert)
    layer.write(expert, gate_up.clone(), torch.zeros_like(down))
    return model


@pytest.mark.parametrize(
    "make",
    [
        # All experts are visited, and no gate depends on which the others are.
        lambda: graph_of(num_experts=4, visits=4),
        lambda: tiny_moe("deepseek_v3", num_experts_per_tok=6, norm_topk_prob=False),
    ],
)
def test_an_expert_that_gives_nothing_is_pruned_first_at_no_loss(make):
    model = without_down(make(), 1, 2)
    found = plan(model, 1, measure=likeness_to(model))
    (step,) = found.steps
    assert step.removal == Removal(1, 2) and step.perplexity_loss == pytest.approx(0, abs=1e-4)
    assert step.other is not None and step.other.into is not None
    assert step.other_perplexity > found.perplexity_before + 1e-3


def test_the_candidate_of_lower_perplexity_is_taken_and_pruning_on_ties():
    calls = iter([10.0, 12.0, 11.0, 11.5, 11.5, 12.5, math.nan])
    found = plan(tiny_moe("mixtral"), 3, measure=lambda model: next(calls))
    assert [step.removal.action for step in found.steps] == ["merge", "prune", "prune"]
    assert [step.perplexity for step in found.steps] == [11.0, 11.5, 12.5]
    assert [step.perplexity_loss for step in found.steps] == [1.0, 0.5, 1.0]
    assert [step.other_perplexity for step in found.steps][:2] == [12.0, 11.5]
    assert found.perplexity_after == 12.5


def test_protected_and_ignored_experts_stay_and_so_does_the_minimum():
    model = tiny_moe("mixtral")
    maps = {"safety": map_of("safety", [4, 4], {0: [1]}), "domain": map_of("domain", [4, 4], {1: [3]})}
    found = plan(model, 3, ignored=frozenset({2}), min_experts_per_layer=2, **maps)
    kept = found.expert_list({}).keep_map
    assert {1, 2} <= set(kept[0].tolist()) and {2, 3} <= set(kept[1].tolist())
    assert sorted(len(experts) for experts in kept.values()) == [2, 3]
    with pytest.raises(UserError, match="at most 4 experts"):
        plan(tiny_moe("mixtral"), 5, ignored=frozenset({2}), min_experts_per_layer=2, **maps)
    with pytest.raises(UserError, match="scan this model"):
        plan(tiny_moe("mixtral"), 1, safety=map_of("safety", [4, 5], {}))


def test_down_to_one_expert_a_layer_and_no_further():
    model = tiny_moe("olmoe")
    found = plan(model, 8)
    assert [layer.num_experts for layer in moe_layers(model)] == [1, 1]
    assert found.expert_list({}).statistics["total_kept"] == 2 and model.config.num_experts == 1
    assert found.perplexity_after == pytest.approx(perplexity(model))
    reads = []
    with pytest.raises(UserError, match="at most 8 experts in the whole model, got `n_prune` 9"):
        plan(tiny_moe("olmoe"), 9, on_step=lambda *step: reads.append(step))
    assert not reads


def test_no_step_leaves_the_model_alone():
    model = tiny_moe("mixtral")
    found = plan(model, 0)
    assert found.steps == [] and found.perplexity_before == found.perplexity_after == perplexity(model)
    assert found.expert_list({}).statistics["total_pruned"] == 0
    assert logit_difference(model, tiny_moe("mixtral"), random_ids(model, 1, 12)) == 0


def test_a_graph_keeps_its_edges_in_order():
    graph = with_random_gains(graph_of(num_experts=4, visits=2))
    found = plan(graph, 4)
    assert graph.config.num_experts == [len(kept) for kept in found.expert_list({}).keep_map.values()]
    assert found.perplexity_after == pytest.approx(perplexity(graph))


def test_layers_that_differ_run_though_the_model_returns_router_logits():
    model = tiny_moe("mixtral")
    model.config.output_router_logits = True
    found = plan(model, 1, max_group_size=1)
    assert {layer.num_experts for layer in moe_layers(model)} == {3, 4}
    assert math.isfinite(found.perplexity_after)


def test_progress_is_told_and_other_metrics_rank():
    told = []
    model = tiny_moe("olmoe")
    ranks = rank_sums([collect_saliency(model, text(model))], "freq", model_wide=True)
    found = plan(model, 2, metric="freq", on_step=lambda *step: told.append(step))
    assert told[-2:] == [("planning steps", 1, 2), ("planning steps", 2, 2)]
    assert ("comparing experts, layers", 2, 2) in told
    np.testing.assert_array_equal(found.ranks, ranks)


def test_bad_options_and_a_perplexity_that_is_none_are_refused():
    with pytest.raises(UserError, match="'loss'"):
        PlanOptions(SelectionRules(model_wide=True), metric="loss")
    with pytest.raises(UserError, match="'up'"):
        PlanOptions(SelectionRules(model_wide=True), alignment="up")
    with pytest.raises(UserError, match="got 0"):
        PlanOptions(SelectionRules(model_wide=True), max_group_size=0)
    with pytest.raises(UserError, match="whole model"):
        PlanOptions(SelectionRules())
    with pytest.raises(UserError, match="got nan"):
        plan(tiny_moe("mixtral"), 1, measure=lambda model: math.nan)
