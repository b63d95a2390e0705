"""Merging experts of an opened model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from configs.choices import Average
from configs.errors import UserError
from models.moe.merge import MergeOptions, merge_experts, output_similarity
from models.moe.refit import block_output
from models.moe.remove import keep_experts
from models.moe.routers import all_gates, router_logits
from models.moe.saliency_collection import collect_saliency
from models.moe.views import moe_layers
from tests.support.module_moe import with_module_experts
from tests.support.tiny_graphs import graph_of, logit_difference, random_ids
from tests.support.tiny_moes import FAMILIES, tiny_moe

KEPT = {0: np.array([1, 3]), 1: np.array([0, 2])}


def calibration(model, padding=0):
    token_mask = torch.ones(2, 12, dtype=torch.bool)
    token_mask[1, 12 - padding :] = False
    return [(random_ids(model, 2, 12, seed=seed), token_mask) for seed in range(2)]


def with_twins(model):
    """Make expert 0 of each layer a twin of expert 1, and 3 one of 2: other neuron order, flipped signs."""
    for layer in moe_layers(model):
        for twin, of in ((0, 1), (3, 2)):
            gate_up, down = layer.read(of)
            gate, up = gate_up.chunk(2)
            order, sign = torch.randperm(len(gate)), torch.sign(torch.randn(len(gate), 1))
            layer.write(twin, torch.cat([gate[order], (up * sign)[order]]), (down * sign.T)[:, order])
            layer.router_weight.data[twin] = layer.router_weight.data[of]
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_merges_and_keeps_router_rows_of_centroids(family):
    model = tiny_moe(family)
    rows = [layer.router_weight[torch.from_numpy(KEPT[layer.ordinal])].clone() for layer in moe_layers(model)]
    groups = merge_experts(model, calibration(model, padding=4), KEPT, MergeOptions())
    for layer, row, group in zip(moe_layers(model), rows, groups, strict=True):
        assert layer.num_experts == 2 and torch.equal(layer.router_weight, row)
        assert list(group) == KEPT[layer.ordinal].tolist()
    assert torch.isfinite(model(input_ids=random_ids(model, 1, 8)).logits).all()


@torch.no_grad()
@pytest.mark.parametrize("similarity", ["gated", "average"])
def test_twins_find_each_other_and_merge_without_loss(similarity):
    model = with_twins(tiny_moe("mixtral"))
    pruned = keep_experts(copy.deepcopy(model), KEPT)
    groups = merge_experts(
        model, calibration(model), KEPT, MergeOptions(similarity, weights="saliency", refit=False)
    )
    assert groups == [{1: [1, 0], 3: [3, 2]}, {0: [0, 1], 2: [2, 3]}]
    # The average of twins, aligned, is the expert itself: what pruning leaves.
    assert logit_difference(model, pruned, random_ids(model, 2, 12)) < 1e-4


@torch.no_grad()
def test_without_alignment_twins_in_another_order_spoil_each_other():
    model = with_twins(tiny_moe("mixtral"))
    pruned = keep_experts(copy.deepcopy(model), KEPT)
    merge_experts(
        model, calibration(model), KEPT, MergeOptions(alignment="none", weights="plain", refit=False)
    )
    assert logit_difference(model, pruned, random_ids(model, 2, 12)) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("weights", [weights for weights in Average if weights != "centroid"])
def test_the_first_layer_is_the_average_with_the_weights_asked_for(weights):
    model = tiny_moe("olmoe")
    expected = tiny_moe("olmoe")
    found = collect_saliency(model, calibration(model))
    saliency = {"saliency": found.reap_sum[0], "mean-saliency": found.scores("reap")[0], "plain": np.ones(5)}[
        weights
    ]
    plan = MergeOptions(alignment="none", weights=weights, refit=False)
    group, *_ = merge_experts(model, calibration(model), {0: np.array([1, 3])}, plan)
    assert sorted(sum(group.values(), [])) == list(range(5))
    before, after = moe_layers(expected)[0], moe_layers(model)[0]
    for index, (centroid, members) in enumerate(group.items()):
        shares = saliency[members] / saliency[members].sum()
        for part in range(2):
            average = sum(s * before.read(e)[part] for s, e in zip(shares.tolist(), members, strict=True))
            torch.testing.assert_close(after.read(index)[part], average, atol=1e-6, rtol=1e-5)
        assert members[0] == centroid
    assert moe_layers(model)[1].num_experts == 5


@torch.no_grad()
def test_later_layers_see_what_merged_layers_give(monkeypatch):
    model, plan = tiny_moe("mixtral"), MergeOptions(weights="saliency")
    merged_first = tiny_moe("mixtral")
    merge_experts(merged_first, calibration(model), {0: KEPT[0]}, plan)
    expected = collect_saliency(merged_first, calibration(model)).reap_sum[1]
    seen = []
    import models.moe.merge as module

    original = module._observe

    def observe(layer, *arguments):
        sample, saliency = original(layer, *arguments)
        seen.append(saliency)
        return sample, saliency

    monkeypatch.setattr(module, "_observe", observe)
    merge_experts(model, calibration(model), KEPT, plan)
    np.testing.assert_allclose(seen[1], expected, rtol=1e-4)


@torch.no_grad()
def test_similarity_is_the_cosine_of_outputs():
    layer = moe_layers(tiny_moe("qwen3_moe"))[0]
    x = torch.randn(150, 32)
    outputs = torch.stack([layer.run(e, x) for e in range(8)])
    gates = all_gates(layer, router_logits(layer, x)).T[..., None]
    for mode, features in (("gated", (outputs * gates).flatten(1)), ("average", outputs.mean(1))):
        expected = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
        np.testing.assert_allclose(output_similarity(layer, x, mode), expected.numpy(), atol=1e-5)


@torch.no_grad()
def test_modules_merge_as_the_fused_do():
    fused = tiny_moe("qwen3_moe")
    modules = with_module_experts(fused)
    kept = {0: np.arange(5), 1: np.arange(3, 8)}
    for model in (fused, modules):
        merge_experts(model, calibration(model), kept, MergeOptions())
    assert logit_difference(fused, modules, random_ids(fused, 2, 12)) < 1e-4


@torch.no_grad()
def test_a_graph_merges_into_a_graph():
    graph = graph_of(num_experts=4, visits=2)
    groups = merge_experts(graph, calibration(graph), {0: np.array([0, 2])}, MergeOptions())
    assert graph.config.num_experts == [2, 4] and sorted(sum(groups[0].values(), [])) == [0, 1, 2, 3]
    assert torch.isfinite(graph(input_ids=random_ids(graph, 1, 8)).logits).all()


@torch.no_grad()
@pytest.mark.parametrize("weights", Average)
@pytest.mark.parametrize("family", ["mixtral", "graph"])
def test_a_refit_comes_closer_to_the_layer_that_was_there(family, weights):
    """Than the same merge without it, and than pruning."""
    whole = graph_of(num_experts=4, visits=2) if family == "graph" else tiny_moe(family)
    text, kept = calibration(whole), {0: KEPT[0]}
    with_refit, without = copy.deepcopy(whole), copy.deepcopy(whole)
    merge_experts(with_refit, text, kept, MergeOptions(weights=weights))
    if weights == "centroid":
        keep_experts(without, kept)
    else:
        merge_experts(without, text, kept, MergeOptions(weights=weights, refit=False))
    x = torch.cat([_first_inputs(whole, ids) for ids, _ in text])
    wanted = block_output(moe_layers(whole)[0], x)
    errors = [float((block_output(moe_layers(m)[0], x) - wanted).norm()) for m in (with_refit, without)]
    assert errors[0] < 0.8 * errors[1]


def _first_inputs(model, ids):
    seen = []
    hook = moe_layers(model)[0].block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(input_ids=ids)
    hook.remove()
    return seen[0].flatten(0, 1)


@torch.no_grad()
def test_all_kept_changes_nothing():
    model = tiny_moe("mixtral")
    groups = merge_experts(model, calibration(model), {}, MergeOptions())
    assert groups == [{expert: [expert] for expert in range(4)}] * 2
    assert logit_difference(model, tiny_moe("mixtral"), random_ids(model, 1, 12)) == 0


def test_bad_plans_and_no_text_are_refused():
    model = tiny_moe("mixtral")
    with pytest.raises(UserError, match="'cosine'"):
        MergeOptions(similarity="cosine")
    with pytest.raises(UserError, match="'up'"):
        MergeOptions(alignment="up")
    with pytest.raises(UserError, match="'mean'"):
        MergeOptions(weights="mean")
    with pytest.raises(UserError, match="that is pruning"):
        MergeOptions(refit=False)
    with pytest.raises(UserError, match="got 0"):
        MergeOptions(max_group_size=0)
    with pytest.raises(UserError, match="no token"):
        merge_experts(model, [], KEPT, MergeOptions())
    with pytest.raises(UserError, match="allow 2"):
        merge_experts(model, calibration(model), KEPT, MergeOptions(max_group_size=1))
