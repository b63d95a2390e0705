"""Compression plans as tables and expert lists."""

from __future__ import annotations

import csv

import numpy as np

from experts.selection.compression_trace import Averaging, CompressionTrace, Removal, Step
from experts.selection.expert_list import load_expert_list, write_expert_list
from experts.selection.trace_file import COLUMNS, write_trace

RANKS = np.array([[1.0, 4.0, 5.0], [2.0, 3.0, np.nan]])
STEPS = [
    Step(Removal(0, 2, 0), 1, 0.5, 0.25, 5.0, 10.5, 0.5, Removal(1, 1), 11.0, Averaging(0.1, 2.5, "sign")),
    Step(Removal(1, 1), 2, None, None, 3.0, 10.25, -0.25),
]
SOURCE = {"files": [], "metric": "reap", "selection_mode": "model_wide", "action_mode": "plan"}


def plan(steps=STEPS):
    return CompressionTrace(steps, RANKS, 10.0)


def test_a_removal_says_what_it_is():
    assert (Removal(1, 2).action, str(Removal(1, 2))) == ("prune", "prune 1:2")
    assert (Removal(1, 2, 0).action, str(Removal(1, 2, 0))) == ("merge", "merge 1:2 into 0")


def test_the_table_has_a_row_a_step_and_empty_cells_for_no_value(tmp_path):
    write_trace(plan(), tmp_path / "new" / "plan.csv")
    with (tmp_path / "new" / "plan.csv").open() as file:
        first, second = csv.DictReader(file)
    assert tuple(first) == COLUMNS
    assert first == {"step": "1", "layer": "0", "decoder_layer": "1", "action": "merge", "expert": "2", "into": "0",
                     "weight_cosine": "0.5", "jaccard": "0.25", "saliency_rank": "5.0", "perplexity": "10.5",
                     "perplexity_loss": "0.5", "other": "prune 1:1", "other_perplexity": "11.0",
                     "weight_into": "0.1", "weight_expert": "2.5", "alignment": "sign"}  # fmt: skip
    assert (second["step"], second["action"], second["perplexity_loss"]) == ("2", "prune", "-0.25")
    assert not any(second[name] for name in ("into", "weight_cosine", "jaccard", "other", "other_perplexity"))


def test_the_list_names_every_expert_and_loads(tmp_path):
    experts = plan().expert_list(SOURCE)
    assert experts.actions.tolist() == [["keep", "keep", "merge"], ["keep", "prune", ""]]
    assert experts.filters == {"min_rank": None, "max_rank": None, "n_prune": 2}
    for path in write_expert_list(experts, tmp_path):
        assert {layer: kept.tolist() for layer, kept in load_expert_list(path).items()} == {0: [0, 1], 1: [0]}


def test_perplexity_after_is_that_of_the_last_step():
    assert plan().perplexity_after == 10.25 and plan([]).perplexity_after == 10.0


def test_a_plan_without_steps_keeps_all(tmp_path):
    assert plan([]).expert_list(SOURCE).statistics["total_pruned"] == 0
    write_trace(plan([]), tmp_path / "plan.csv")
    assert (tmp_path / "plan.csv").read_text() == ",".join(COLUMNS) + "\n"
