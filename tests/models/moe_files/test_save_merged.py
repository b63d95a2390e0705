"""Checkpoints of models whose experts were merged."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from configs.errors import UserError
from experts.selection.compression_trace import Removal, Step
from models.checkpoints.load import load_causal_lm, load_tokenizer
from models.checkpoints.save import cast_weights, save_checkpoint
from models.moe.remove import keep_experts
from models.moe_files.layout import read_moe_layout
from models.moe_files.prune import preview_prune
from models.moe_files.save_merged import planned_keep_map, save_merged
from tests.support.tiny_graphs import logit_difference, random_ids
from tests.support.tiny_moes import FAMILIES, saved_moe


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_what_was_in_memory_with_all_that_lay_beside(family, tmp_path, tiny_tokenizer):
    source = saved_moe(family, tmp_path, tiny_tokenizer)
    (source / "notes.txt").write_text("mine")
    kept = {layer: np.array([0, 2]) for layer in range(2)}
    model, config = keep_experts(load_causal_lm(str(source)), kept), preview_prune(source, kept).config
    save_merged(model, source, tmp_path / "out", config=config, overwrite=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    saved = load_causal_lm(str(tmp_path / "out"))
    assert logit_difference(saved, model, random_ids(model, 1, 12)) < 1e-5
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    size = read_moe_layout(tmp_path / "out")
    assert size.weight_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size.parameters < read_moe_layout(source).parameters


def test_a_graph_keeps_its_code_and_tokenizer_and_counts_its_version(tmp_path, tiny_graph_dir):
    kept = {0: np.array([1, 2])}
    graph, config = (
        keep_experts(load_causal_lm(str(tiny_graph_dir)), kept),
        preview_prune(tiny_graph_dir, kept).config,
    )
    save_merged(graph, tiny_graph_dir, tmp_path / "out", config=config, overwrite=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["graph_version"] == 1 and config["num_experts"] == [2, 4] and "auto_map" in config
    assert load_tokenizer(str(tmp_path / "out")).vocab_size == 64
    saved = load_causal_lm(str(tmp_path / "out"))
    assert logit_difference(saved, graph, random_ids(graph, 1, 12)) < 1e-5


def test_widened_weights_are_saved_in_the_dtype_they_were_stored_in(monkeypatch, tmp_path, tiny_graph_dir):
    half = cast_weights(load_causal_lm(str(tiny_graph_dir)), torch.bfloat16)
    save_checkpoint(half, load_tokenizer(str(tiny_graph_dir)), tmp_path)
    monkeypatch.setattr("models.runtime.precision.beats_fp32", lambda dtype, device: False)
    opened = load_causal_lm(str(tmp_path), precision="auto")
    assert opened.dtype == torch.float32
    config = json.loads((tmp_path / "config.json").read_text())
    save_merged(opened, tmp_path, tmp_path / "out", config=config, overwrite=False)
    saved = load_causal_lm(str(tmp_path / "out"))
    for (name, parameter), stored in zip(saved.named_parameters(), half.parameters(), strict=True):
        assert parameter.dtype == stored.dtype and torch.equal(parameter, stored), name


def test_a_folder_in_use_is_refused(tmp_path, tiny_graph_dir):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    graph = load_causal_lm(str(tiny_graph_dir))
    with pytest.raises(UserError, match="`overwrite`"):
        save_merged(graph, tiny_graph_dir, tmp_path / "out", config={}, overwrite=False)
    assert (tmp_path / "out" / "mine").read_text() == "x"


def steps_of(*removals: Removal) -> list[Step]:
    return [Step(each, each.layer, None, None, 1, 1, 0) for each in removals]


def test_the_keep_map_of_a_plan_is_what_its_steps_leave(tmp_path, tiny_graph_dir, tiny_tokenizer):
    uneven = steps_of(Removal(0, 2), Removal(0, 0, 3))
    kept = planned_keep_map(read_moe_layout(tiny_graph_dir), uneven)
    assert {layer: experts.tolist() for layer, experts in kept.items()} == {0: [1, 3], 1: [0, 1, 2, 3]}
    mixtral = read_moe_layout(saved_moe("mixtral", tmp_path, tiny_tokenizer))
    with pytest.raises(UserError, match=r"configuration of mixtral holds one number, got \[2, 4\]"):
        planned_keep_map(mixtral, uneven)
    kept = planned_keep_map(mixtral, steps_of(Removal(0, 2), Removal(1, 1)))
    assert {layer: experts.tolist() for layer, experts in kept.items()} == {0: [0, 1, 3], 1: [0, 2, 3]}
    with pytest.raises(UserError, match="the plan is of another model"):
        planned_keep_map(mixtral, steps_of(Removal(0, 4)))
