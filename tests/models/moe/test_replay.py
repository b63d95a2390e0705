"""Execution of compression traces, against the planner's own model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from configs.errors import UserError
from experts.selection.compression_trace import Averaging, Removal, Step
from experts.selection.rules import SelectionRules
from experts.selection.trace_file import read_trace, write_trace
from models.checkpoints.load import load_causal_lm
from models.checkpoints.save import save_checkpoint
from models.moe.planner import PlanOptions, plan_compression
from models.moe.replay import execute_removal, replay_trace
from models.moe.views import moe_layers
from models.moe_files.prune import preview_prune
from models.moe_files.save_merged import save_merged
from models.runtime.perplexity import batches_loss
from tests.support.module_moe import with_module_experts
from tests.support.tiny_graphs import graph_of, logit_difference, random_ids, with_random_gains
from tests.support.tiny_moes import FAMILIES, tiny_moe


def text(model, seed=0):
    token_mask = torch.ones(2, 12, dtype=torch.bool)
    token_mask[1, 8:] = False
    return [(random_ids(model, 2, 12, seed=seed + batch), token_mask) for batch in range(2)]


def perplexity(model):
    return batches_loss(model, text(model, seed=10)).perplexity


def planned(model, n_prune, **rules):
    """The trace of a plan, and the planner's model."""
    model = copy.deepcopy(model)
    options = PlanOptions(SelectionRules(n_prune=n_prune, model_wide=True, **rules))
    return plan_compression(model, text(model), perplexity, options), model


def model_of(name):
    if name == "graph":
        return with_random_gains(graph_of(num_experts=4, visits=2))
    return with_module_experts(tiny_moe("olmoe")) if name == "modules" else tiny_moe(name)


@pytest.mark.parametrize("name", [*FAMILIES, "graph", "modules"])
def test_a_replayed_trace_is_the_planners_model_bit_for_bit(name, tmp_path):
    model = model_of(name)
    trace, expected = planned(model, 4)
    write_trace(trace, tmp_path / "plan.csv")
    groups = replay_trace(model, read_trace(tmp_path / "plan.csv"))
    ids = random_ids(model, 2, 12)
    assert logit_difference(model, expected, ids) == 0
    assert perplexity(model) == trace.perplexity_after
    kept = trace.expert_list({}).keep_map
    assert [list(group) for group in groups] == [kept[layer].tolist() for layer in sorted(kept)]
    pruned = {(s.removal.layer, s.removal.expert) for s in trace.steps if s.removal.into is None}
    for layer, group in enumerate(groups):
        members = sorted(sum(group.values(), []))
        assert len(members) == len(set(members)) and all(first == key for key, (first, *_) in group.items())
        # A pruned expert takes those with it that were merged into it before.
        assert not {expert for at, expert in pruned if at == layer} & set(members)


def saved(name, tmp_path, tokenizer):
    source = tmp_path / "model"
    if name == "graph":
        source.mkdir()
        save_checkpoint(model_of(name), tokenizer, source)
    else:
        tiny_moe(name).save_pretrained(source)
        tokenizer.save_pretrained(source)
    return source


@pytest.mark.parametrize(
    ("name", "experts"), [("mixtral", 4), ("granitemoe", 4), ("deepseek_v3", 6), ("graph", 4)]
)
def test_the_written_checkpoint_has_the_perplexity_of_the_trace(name, experts, tmp_path, tiny_tokenizer):
    source = saved(name, tmp_path, tiny_tokenizer)
    trace, _ = planned(load_causal_lm(str(source)), 4, min_experts_per_layer=experts - 2)
    assert {step.removal.action for step in trace.steps} <= {"merge", "prune"} and len(trace.steps) == 4
    write_trace(trace, tmp_path / "plan.csv")
    model = load_causal_lm(str(source))
    groups = replay_trace(model, read_trace(tmp_path / "plan.csv"))
    kept = {layer: np.arange(len(each)) for layer, each in enumerate(groups)}
    config = preview_prune(source, kept).config
    save_merged(model, source, tmp_path / "out", config=config, overwrite=False)
    written = perplexity(load_causal_lm(str(tmp_path / "out")))
    assert written == pytest.approx(trace.perplexity_after, rel=1e-6)
    assert abs(written - trace.perplexity_before) > 1e-3


@torch.no_grad()
def test_a_merge_is_the_weighted_average_of_two_experts_and_numbers_are_the_original_ones():
    model, original = tiny_moe("mixtral"), tiny_moe("mixtral")
    steps = [
        Step(Removal(0, 0), 0, None, None, 1, 1, 0),
        Step(Removal(0, 3, 1), 0, 1, 1, 1, 1, 0, averaging=Averaging(1.0, 3.0, "none")),
    ]
    assert replay_trace(model, steps) == [{1: [1, 3], 2: [2]}, {e: [e] for e in range(4)}]
    before, after = (moe_layers(each)[0] for each in (original, model))
    for one, other, found in zip(before.read(1), before.read(3), after.read(0), strict=True):
        torch.testing.assert_close(found, (one + 3 * other) / 4)
    assert torch.equal(after.read(1)[0], before.read(2)[0])
    assert torch.equal(after.router_weight, before.router_weight[1:3])
    assert model.config.num_local_experts == 4


@torch.no_grad()
def test_one_removal_prunes_by_the_original_number():
    layer = moe_layers(tiny_moe("olmoe"))[0]
    rows = layer.router_weight.clone()
    execute_removal(layer, [1, 3, 4, 6, 9], Removal(0, 4), None)
    assert torch.equal(layer.router_weight, rows[[0, 1, 3, 4]])


@pytest.mark.parametrize(
    ("removal", "decoder", "words"),
    [
        (Removal(2, 0), 2, "step 1: expected a layer and experts of this model, got prune 2:0"),
        (Removal(0, 4), 0, "got prune 0:4"),
        (Removal(0, 1, 7), 0, "got merge 0:1 into 7"),
        (Removal(0, 1), 1, "in decoder layer 1; the plan is of another model"),
    ],
)
def test_steps_of_another_model_are_refused_before_anything_is_changed(removal, decoder, words):
    model = tiny_moe("mixtral")
    with pytest.raises(UserError, match=words):
        replay_trace(model, [Step(removal, decoder, None, None, 1, 1, 0)])
    assert [layer.num_experts for layer in moe_layers(model)] == [4, 4]


def test_a_layer_keeps_an_expert_and_alignments_are_known():
    steps = [Step(Removal(0, expert), 0, None, None, 1, 1, 0) for expert in range(4)]
    with pytest.raises(UserError, match="step 4: expected an expert to stay in MoE layer 0"):
        replay_trace(tiny_moe("mixtral"), steps)
    steps = [Step(Removal(0, 1, 0), 0, 1, 1, 1, 1, 0, averaging=Averaging(1, 1, "up"))]
    with pytest.raises(UserError, match="'up'"):
        replay_trace(tiny_moe("mixtral"), steps)


def test_progress_is_reported():
    told: list[tuple] = []
    model = tiny_moe("mixtral")
    trace, _ = planned(model, 2)
    replay_trace(model, trace.steps, on_step=lambda *step: told.append(step))
    assert told == [("executing steps", 1, 2), ("executing steps", 2, 2)]
    assert np.isfinite(perplexity(model))
