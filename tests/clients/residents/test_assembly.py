"""The residents chosen for a round against the two candidates: assembler and most used experts."""

from __future__ import annotations

import pytest
import torch

from clients.residents.assembler import Assembler, most_used
from clients.residents.assembly import assemble
from clients.residents.expert_features import expert_features
from configs.schema import RunConfig
from federated.data.blocks import Blocks, batches
from models.graph.runtime_settings import residents
from tests.support.local_training import local_training
from tests.support.tiny_graphs import graph_of, random_ids

VISITS = [2, 2]


class Stream:
    """Endless batches of two blocks; ``taken`` counts them."""

    def __init__(self, train: Blocks) -> None:
        self.batches, self.taken = batches(train, 2, generator=torch.Generator().manual_seed(0)), 0

    def __iter__(self):
        return self

    def __next__(self):
        self.taken += 1
        return next(self.batches)


def prefer(assembler: Assembler, *experts: int) -> Assembler:
    """Give the own logit of ``experts`` such a value that the assembler holds them."""
    with torch.no_grad():
        for logits in assembler.own:
            logits[list(experts)] = 100.0
    return assembler


def run(**keys):
    model = graph_of(visits=2)
    ids = random_ids(model, 20, 16)
    train, assembler = Blocks(ids, ids), prefer(Assembler([4, 4]), 0, 3)
    stream = Stream(train)
    config = RunConfig(assembler_steps=3, lookahead_steps=2, **keys)
    found = assemble(
        assembler, model, train, stream, budget=2, visits=VISITS, config=config, training=local_training()
    )
    return model, train, stream, found


def as_lists(held):
    return [layer.tolist() for layer in held]


@pytest.mark.parametrize("best", [0, 1])
def test_the_better_of_both_candidates_is_held(monkeypatch, best):
    seen = []

    def choose(model, candidates, tried, training, *, hold):
        seen.append((candidates, len(tried)))
        return best

    monkeypatch.setattr("clients.residents.assembly.best_residents", choose)
    model, train, stream, found = run()
    ((candidates, tried),) = seen
    assert as_lists(candidates[0]) == [[True, False, False, True]] * 2
    features = expert_features(graph_of(visits=2), train.input_ids[:16], train.labels[:16], visits=VISITS)
    assert as_lists(candidates[1]) == as_lists(found.most_used) == as_lists(most_used(features, 2))
    assert as_lists(found.chosen) == as_lists(residents(model)) == as_lists(candidates[best])
    assert (tried, stream.taken) == (2, 3 + 2)


def test_with_lora_factors_the_assemblers_choice_is_held_without_a_trial():
    model, _, stream, found = run(lora_rank=2, weights="nf4")
    assert as_lists(found.chosen) == as_lists(residents(model)) == [[True, False, False, True]] * 2
    assert stream.taken == 3
