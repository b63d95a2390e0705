"""Experts kept by saliency and at random, and perplexity without the others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.support.expert_removal import (
    PLANS,
    Text,
    compare,
    kept_by,
    perplexity,
    pruned_perplexity,
    random_experts,
)
from configs.choices import Metric
from federated.data.blocks import Blocks
from models.moe.saliency_collection import collect_saliency
from tests.support.tiny_graphs import random_ids
from tests.support.tiny_moes import tiny_moe


@pytest.mark.parametrize("share", [2, 4])
def test_as_many_experts_stay_by_saliency_as_at_random(share):
    moe = tiny_moe("mixtral")
    saliency = collect_saliency(moe, [(random_ids(moe, 2, 10), torch.ones(2, 10, dtype=torch.bool))])
    for keep_map in (
        kept_by(saliency, "freq", share),
        random_experts(saliency, share, np.random.default_rng(0)),
    ):
        assert [len(np.unique(kept)) for kept in keep_map.values()] == [4 - 4 // share] * 2


def text_for(moe) -> Text:
    ids = random_ids(moe, 2, 10)
    return Text(Blocks(ids, ids), [(ids, torch.ones_like(ids, dtype=torch.bool))], Blocks(ids, ids))


def test_perplexity_is_that_of_the_held_out_loss_and_unchanged_where_all_experts_stay():
    moe = tiny_moe("mixtral")
    text, ids = text_for(moe), text_for(moe).valid.input_ids
    with torch.no_grad():
        expected = math.exp(moe(input_ids=ids, labels=ids).loss)
    assert perplexity(moe, text) == pytest.approx(expected, rel=1e-4)
    everything = {layer: np.arange(4) for layer in range(2)}
    assert pruned_perplexity(moe, text, everything) == pytest.approx(expected, rel=1e-5)


def test_comparison_has_every_arm_and_leaves_the_model_unchanged():
    moe = tiny_moe("mixtral")
    before = {name: value.clone() for name, value in moe.state_dict().items()}
    found = compare(moe, text_for(moe), seed=0)
    assert set(found) == {"all", "quarter", "half"}
    assert set(found["half"]) == {*Metric, "random", *PLANS}
    assert all(torch.equal(value, before[name]) for name, value in moe.state_dict().items())
