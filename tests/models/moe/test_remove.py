"""Taking experts out of an opened model, against the checkpoint that is pruned on the disk."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.errors import UserError
from models.checkpoints.load import load_causal_lm
from models.moe.remove import experts_removed, keep_experts, remove_experts, set_counts
from models.moe.views import moe_layers
from models.moe_files.prune import prune_checkpoint
from tests.support.module_moe import with_module_experts
from tests.support.tiny_graphs import graph_of, logit_difference, random_ids, with_random_gains
from tests.support.tiny_moes import FAMILIES, saved_moe, tiny_moe

KEPT = {0: np.array([1, 2, 3]), 1: np.array([0, 2, 3])}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shrunk_model_is_the_pruned_checkpoint_and_can_be_saved(family, tmp_path, tiny_tokenizer):
    source = saved_moe(family, tmp_path, tiny_tokenizer)
    prune_checkpoint(source, tmp_path / "pruned", KEPT)
    pruned = load_causal_lm(str(tmp_path / "pruned"))
    model = keep_experts(tiny_moe(family), KEPT)
    ids = random_ids(model, 2, 12)
    assert [layer.num_experts for layer in moe_layers(model)] == [3, 3]
    assert logit_difference(model, pruned, ids) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    assert logit_difference(load_causal_lm(str(tmp_path / "saved")), pruned, ids) < 1e-5


@torch.no_grad()
def test_a_shrunk_graph_is_the_pruned_graph(tiny_graph_dir, tmp_path):
    kept = {0: np.array([0, 2, 3]), 1: np.array([1])}
    prune_checkpoint(tiny_graph_dir, tmp_path / "pruned", kept)
    pruned = load_causal_lm(str(tmp_path / "pruned"))
    graph = keep_experts(load_causal_lm(str(tiny_graph_dir)), kept)
    assert logit_difference(graph, pruned, random_ids(graph, 2, 12)) < 1e-5
    assert graph.config.num_experts == pruned.config.num_experts == [3, 1]
    graph.save_pretrained(tmp_path / "saved")
    saved = load_causal_lm(str(tmp_path / "saved"))
    assert logit_difference(saved, pruned, random_ids(graph, 2, 12)) < 1e-5


@torch.no_grad()
def test_modules_shrink_as_the_fused_do():
    fused = tiny_moe("olmoe")
    modules = keep_experts(with_module_experts(fused), KEPT)
    assert logit_difference(modules, keep_experts(fused, KEPT), random_ids(fused, 2, 12)) < 1e-5
    assert [len(layer.experts) for layer in moe_layers(modules)] == [3, 3]


@torch.no_grad()
def test_one_expert_may_be_left_and_layers_may_differ():
    model = keep_experts(tiny_moe("mixtral"), {1: np.array([2])})
    assert [layer.num_experts for layer in moe_layers(model)] == [4, 1]
    assert torch.isfinite(model(input_ids=random_ids(model, 1, 8)).logits).all()
    assert model.config.num_local_experts == 4
    keep_experts(model, {0: np.array([0])})
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (1, 1)


@torch.no_grad()
def test_merged_experts_of_a_graph_leave_their_edges():
    graph = with_random_gains(graph_of(num_experts=4))
    remove_experts(moe_layers(graph)[0], {3: 1})
    set_counts(graph)
    assert graph.config.num_experts == [3, 4]
    assert graph.expert_layers()[0].edge_gain.shape == (3, 3)
    assert torch.isfinite(graph(input_ids=random_ids(graph, 1, 8)).logits).all()


def test_nothing_to_take_changes_nothing_and_all_is_refused():
    model = tiny_moe("mixtral")
    layer = moe_layers(model)[0]
    weight = layer.router_weight
    remove_experts(layer, {})
    assert moe_layers(model)[0].router_weight is weight
    with pytest.raises(UserError, match="MoE layer 0"):
        remove_experts(layer, dict.fromkeys(range(4)))


def model_of(name):
    if name == "graph":
        return with_random_gains(graph_of(num_experts=4))
    return with_module_experts(tiny_moe("olmoe")) if name == "modules" else tiny_moe(name)


@torch.no_grad()
@pytest.mark.parametrize("name", [*FAMILIES, "graph", "modules"])
def test_experts_are_removed_for_a_while_and_the_model_comes_back(name):
    model, ids = model_of(name), random_ids(model_of(name), 2, 12)
    whole, config = model(input_ids=ids).logits, model.config.to_dict()
    weights = {key: value.data_ptr() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"), experts_removed(model, {0: KEPT[0]}) as removed:
        expected = keep_experts(model_of(name), {0: KEPT[0]})
        assert torch.equal(removed(input_ids=ids).logits, expected(input_ids=ids).logits)
        assert logit_difference(removed, model_of(name), ids) > 1e-4
        raise RuntimeError("stop")
    assert torch.equal(model(input_ids=ids).logits, whole) and model.config.to_dict() == config
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == weights
