"""Saved state of a run; whole runs are continued in tests/server/test_resume.py."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from server.model.global_model import GlobalModel
from server.state.federation_state import FederationState
from server.state.journal import Journal
from server.state.run_history import RunHistory
from server.state.usage_average import UsageAverage
from tests.support.tiny_federation import all_equal, random_change, save_tiny_graph


@pytest.fixture(scope="module")
def graph(tmp_path_factory, tiny_tokenizer) -> Path:
    return save_tiny_graph(
        tmp_path_factory.mktemp("journal") / "graph", tiny_tokenizer, num_experts=4, visits=2
    )


def saved_rounds(graph: Path, folder: Path, count: int) -> tuple[GlobalModel, Journal]:
    """A model after ``count`` rounds, each of them saved."""
    model, journal = GlobalModel(str(graph)), Journal(folder)
    for number in range(1, count + 1):
        model.advance(random_change(model.model, [(0, 1), (1, 2)], seed=number), value_bits=2, density=0.3)
        usage = UsageAverage([np.full((4, 4), number / 3)] * 2)
        journal.save(model, FederationState(number, number, usage=usage), RunHistory(rounds=number))
    return model, journal


def test_a_saved_round_comes_back_bit_for_bit(graph, tmp_path):
    model, journal = saved_rounds(graph, tmp_path, 3)
    again = GlobalModel(str(graph))
    saved = journal.restore(again)
    assert all_equal(again.model, model.model) and again.copy_hash == model.copy_hash
    assert again.residual.keys() == model.residual.keys() != set()
    assert all(torch.equal(again.residual[unit], vector) for unit, vector in model.residual.items())
    assert saved.state.server_round == 3 and saved.history == RunHistory(rounds=3)
    assert np.array_equal(saved.state.usage.counts[1], np.full((4, 4), 1.0))


def test_nothing_saved_leaves_the_bootstrapped_model(graph, tmp_path):
    model = GlobalModel(str(graph))
    assert Journal(tmp_path).restore(model) is None and model.version == 0


@pytest.mark.parametrize("damaged", ["round-3", "step-3"])
@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_damaged_round_or_step_falls_back_to_the_round_before(graph, tmp_path, caplog, damaged, content):
    _, journal = saved_rounds(graph, tmp_path / "whole", 3)
    expected, _ = saved_rounds(graph, tmp_path / "two", 2)
    path = journal.folder / f"{damaged}.safetensors"
    path.write_bytes(path.read_bytes()[:-7] if content is None else content)
    again = GlobalModel(str(graph))
    with caplog.at_level(logging.WARNING):
        assert journal.restore(again).state.server_round == 2
    assert all_equal(again.model, expected.model)
    assert "the state of round 3" in caplog.text


def test_a_state_of_another_graph_is_refused(graph, tmp_path, tiny_tokenizer):
    _, journal = saved_rounds(graph, tmp_path, 1)
    other = save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=4, visits=2, seed=5)
    with pytest.raises(UserError, match="expected the saved model of version 1"):
        journal.restore(GlobalModel(str(other)))


def test_clearing_removes_the_state(graph, tmp_path):
    _, journal = saved_rounds(graph, tmp_path, 1)
    journal.clear()
    assert not journal.folder.exists()
