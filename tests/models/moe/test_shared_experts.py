"""Graphs with shared experts and default outputs: saliency, removal, merging, plans, in memory and on the disk."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.errors import UserError
from experts.selection.compression_trace import Removal, Step
from experts.selection.rules import SelectionRules
from models.checkpoints.load import load_causal_lm
from models.checkpoints.save import save_checkpoint
from models.graph.graph_state import read_graph
from models.moe.merge import MergeOptions, merge_experts
from models.moe.planner import PlanOptions, plan_compression
from models.moe.remove import experts_removed, keep_experts
from models.moe.replay import replay_trace
from models.moe.saliency_collection import collect_saliency
from models.moe.views import moe_layers
from models.moe_files.layout import read_moe_layout
from models.moe_files.prune import preview_prune, prune_checkpoint
from models.moe_files.save_merged import planned_keep_map, save_merged
from models.runtime.perplexity import batches_loss
from tests.support.tiny_graphs import logit_difference, random_ids, shared_graph_of, with_random_gains

KEPT = {0: np.array([0, 1, 3, 4, 7]), 1: np.array([0, 1, 2])}


def graph():
    return with_random_gains(shared_graph_of())


def text(model, seed=0):
    token_mask = torch.ones(2, 12, dtype=torch.bool)
    token_mask[1, 8:] = False
    return [(random_ids(model, 2, 12, seed=seed + batch), token_mask) for batch in range(2)]


def perplexity(model):
    return batches_loss(model, text(model, seed=10)).perplexity


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_tokenizer):
    directory = tmp_path_factory.mktemp("shared") / "graph"
    directory.mkdir()
    save_checkpoint(graph(), tiny_tokenizer, directory)
    return directory


def test_the_layout_tells_shared_experts_and_refuses_impossible_ones(source, tmp_path):
    layout = read_moe_layout(source)
    assert (layout.experts_per_layer, layout.shared_per_layer) == ([8, 8], [2, 2])
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    for wrong, message in (([2], "one number for each of 2 layers"), ([2, 9], "at most 8 shared experts")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_shared": wrong}))
        with pytest.raises(UserError, match=message):
            read_moe_layout(tmp_path)


@torch.no_grad()
def test_every_token_counts_for_every_shared_expert():
    model = graph()
    saliency = collect_saliency(model, text(model))
    assert saliency.num_shared == (2, 2) and saliency.provenance["tokens"] == 40
    assert (saliency.freq[:, :2] == 40).all()
    # The other two of the four visits of each token.
    assert (saliency.freq[:, 2:].sum(axis=1) == 80).all() and (saliency.freq[:, 2:] < 40).any()


@torch.no_grad()
def test_a_shrunk_model_is_the_pruned_checkpoint(source, tmp_path):
    report = prune_checkpoint(source, tmp_path / "pruned", KEPT)
    pruned, model = load_causal_lm(str(tmp_path / "pruned")), keep_experts(graph(), KEPT)
    ids = random_ids(model, 2, 12)
    assert logit_difference(model, pruned, ids) < 1e-5
    assert logit_difference(model, graph(), ids) > 1e-3
    model.save_pretrained(tmp_path / "saved")
    assert logit_difference(load_causal_lm(str(tmp_path / "saved")), pruned, ids) < 1e-5
    for config in (pruned.config, model.config):
        assert (config.num_experts, config.num_shared, config.default_rank) == ([5, 3], [2, 2], 3)
        assert config.default_experts == [8, 8]
    assert report.warnings == ()
    for layer in read_graph(pruned).masks:
        np.testing.assert_array_equal(layer[:2], np.eye(len(layer), dtype=bool)[:2])
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "pruned"))
    defaults = [name for name in before if ".default." in name]
    assert len(defaults) == 6 and all(torch.equal(before[name], after[name]) for name in defaults)


@torch.no_grad()
def test_pruned_again_the_default_still_stands_for_all_that_it_was_fitted_for(source, tmp_path):
    first, second = {0: np.arange(6), 1: np.arange(7)}, {0: np.arange(4), 1: np.arange(3)}
    prune_checkpoint(source, tmp_path / "once", first)
    prune_checkpoint(tmp_path / "once", tmp_path / "twice", second)
    prune_checkpoint(source, tmp_path / "direct", second)
    twice, direct = (load_causal_lm(str(tmp_path / name)) for name in ("twice", "direct"))
    assert twice.config.default_experts == [8, 8]
    assert logit_difference(twice, direct, random_ids(direct, 2, 12)) < 1e-5


@torch.no_grad()
def test_a_removed_expert_counts_as_unvisited():
    model = shared_graph_of()
    layer, x_TD = model.expert_layers()[0], torch.randn(5, 32)
    wanted = (1 - 4 / 8) * (x_TD @ layer.default.down.T @ layer.default.up.T + layer.default.bias)
    keep_experts(model, {0: np.arange(4), 1: np.arange(4)})
    layer = model.expert_layers()[0]
    assert layer.num_experts == layer.num_visits == 4
    experts = sum(layer.run_expert(expert, x_TD) for expert in range(4))
    torch.testing.assert_close(layer(x_TD), experts + wanted)


def test_a_shared_expert_is_not_removed(source):
    kept = {0: np.arange(1, 8)}
    message = "layer 0: expected the shared experts 0 to 1"
    with pytest.raises(UserError, match=message):
        preview_prune(source, kept)
    with pytest.raises(UserError, match=message):
        merge_experts(graph(), text(graph()), kept, MergeOptions())
    with pytest.raises(UserError, match="layer 0, got 0, one of its 2 shared experts"):
        keep_experts(graph(), kept)
    steps = [Step(Removal(0, 3), 0, None, None, 1, 1, 0), Step(Removal(0, 2, 1), 0, None, None, 1, 1, 0)]
    for refuse in (
        lambda: replay_trace(graph(), steps),
        lambda: planned_keep_map(read_moe_layout(source), steps),
    ):
        with pytest.raises(UserError, match="step 2: .* got merge 0:2 into 1; the first 2 experts"):
            refuse()


@torch.no_grad()
def test_experts_are_removed_for_a_while():
    model, ids = graph(), random_ids(graph(), 2, 12)
    whole = model(input_ids=ids).logits
    with experts_removed(model, KEPT) as removed:
        assert torch.equal(removed(input_ids=ids).logits, keep_experts(graph(), KEPT)(input_ids=ids).logits)
    assert torch.equal(model(input_ids=ids).logits, whole) and model.config.default_experts is None


@torch.no_grad()
@pytest.mark.parametrize("weights", ["centroid", "saliency"])
def test_merging_leaves_shared_experts_and_the_default_as_they_are(weights, source, tmp_path):
    model = load_causal_lm(str(source))
    before = copy.deepcopy(model)
    groups = merge_experts(model, text(model), KEPT, MergeOptions(weights=weights, max_group_size=6))
    for group, old, new in zip(groups, before.expert_layers(), model.expert_layers(), strict=True):
        assert group[0] == [0] and group[1] == [1]
        assert sorted(sum(group.values(), [])) == list(range(8))
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(getattr(old, name)[:2], getattr(new, name)[:2])
        assert new.num_shared == 2 and new.default.num_experts == 8
        assert torch.equal(old.default.up, new.default.up)
    ids = random_ids(model, 2, 12)
    pruned = keep_experts(copy.deepcopy(before), KEPT)
    assert logit_difference(model, pruned, ids) > 1e-4
    save_merged(model, source, tmp_path / "out", config=preview_prune(source, KEPT).config, overwrite=False)
    saved = load_causal_lm(str(tmp_path / "out"))
    assert saved.config.num_shared == [2, 2] and saved.config.default_experts == [8, 8]
    assert logit_difference(saved, model, ids) < 1e-5


def test_a_merge_needs_a_routed_expert_to_merge_into():
    with pytest.raises(UserError, match="an expert to merge the others into"):
        merge_experts(graph(), text(graph()), {0: np.arange(2)}, MergeOptions())


@torch.no_grad()
def test_a_plan_names_routed_experts_only_and_replays_bit_for_bit():
    model, planner = graph(), graph()
    options = PlanOptions(SelectionRules(n_prune=10, model_wide=True))
    trace = plan_compression(planner, text(model), perplexity, options)
    for step in trace.steps:
        assert min(step.removal.expert, step.removal.into or step.removal.expert) >= 2
    # One routed expert a layer stays.
    assert [layer.num_experts for layer in moe_layers(planner)] == [3, 3]
    assert any(step.removal.into is not None for step in trace.steps)
    replay_trace(model, trace.steps)
    assert logit_difference(model, planner, random_ids(model, 2, 12)) == 0
    with pytest.raises(UserError, match="at most 10 experts in the whole model"):
        plan_compression(graph(), text(model), perplexity, PlanOptions(SelectionRules(11, True)))
