from __future__ import annotations

import math

import pytest
import torch

from models.runtime.perplexity import LossSum, batches_loss, evaluate_loss
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import random_ids


@pytest.fixture(scope="module")
def dense():
    return tiny_llama()


def test_sums_add_up_and_nothing_is_nan():
    total = sum([LossSum(6.0, 3), LossSum(2.0, 1)], LossSum())
    assert total == LossSum(8.0, 4) and total.mean == 2.0
    assert total.perplexity == pytest.approx(math.e**2)
    assert math.isnan(LossSum().mean) and math.isnan(LossSum().perplexity)
    assert LossSum(1e6, 1).perplexity == math.inf
    assert math.isnan(LossSum(math.nan, 3).perplexity)


@torch.no_grad()
def test_the_mean_is_hugging_faces_own_loss(dense):
    ids = random_ids(dense, 5, 30)
    loss = evaluate_loss(dense, ids, ids, batch_size=2)
    assert loss.tokens == 5 * 29
    assert loss.mean == pytest.approx(float(dense(input_ids=ids, labels=ids).loss), rel=1e-5)


def test_tokens_are_weighed_alike_whatever_the_batches(dense):
    ids = random_ids(dense, 7, 12)
    labels = ids.clone()
    labels[3, 4:] = -100
    labels[6] = -100
    parts = [evaluate_loss(dense, ids, labels, batch_size=size) for size in (1, 3, 16)]
    assert len({part.tokens for part in parts}) == 1 and parts[0].tokens == 5 * 11 + 3
    for part in parts[1:]:
        assert part.nll == pytest.approx(parts[0].nll, rel=1e-5)


@pytest.mark.parametrize("most, expected", [(3 * 12 * 64, [3, 3, 1]), (1, [1] * 7), (2**25, [7])])
def test_a_pass_has_only_so_many_logits(monkeypatch, dense, most, expected):
    ids, passes = random_ids(dense, 7, 12), []
    whole = evaluate_loss(dense, ids, ids)
    monkeypatch.setattr("models.runtime.perplexity._MOST_LOGITS", most)
    with dense.register_forward_hook(lambda module, args, output: passes.append(len(output.logits))):
        parts = evaluate_loss(dense, ids, ids)
    assert passes == expected and dense.config.vocab_size == 64
    assert parts.tokens == whole.tokens and parts.nll == pytest.approx(whole.nll, rel=1e-5)


def test_padding_is_left_out(dense):
    ids = random_ids(dense, 1, 20)
    padded = torch.cat([ids[:, :12], torch.zeros(1, 8, dtype=torch.int64)], -1)
    labels = padded.clone()
    labels[:, 12:] = -100
    short, long = evaluate_loss(dense, ids[:, :12], ids[:, :12]), evaluate_loss(dense, padded, labels)
    assert long.tokens == short.tokens == 11 and long.nll == pytest.approx(short.nll, rel=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (2, 1)])
def test_where_nothing_is_predicted_the_perplexity_is_nan(dense, shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    loss = evaluate_loss(dense, ids, ids)
    assert loss == LossSum(0.0, 0) and math.isnan(loss.perplexity)
    labels = torch.full((2, 4), -100)
    assert evaluate_loss(dense, torch.zeros(2, 4, dtype=torch.int64), labels).tokens == 0


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_given_back(training):
    model = tiny_llama(attention_dropout=0.9).train(training)
    ids = random_ids(model)
    losses = {evaluate_loss(model, ids, ids).nll for _ in range(2)}
    assert len(losses) == 1 and model.training is training


def test_autocast_stays_near(dense):
    ids = random_ids(dense, 4, 30)
    exact, rounded = (evaluate_loss(dense, ids, ids, autocast=on).mean for on in (False, True))
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.02)


def test_batches_count_only_the_tokens_that_count(dense):
    ids = random_ids(dense, 4, 12)
    counted = torch.ones(4, 12, dtype=torch.bool)
    counted[3, 5:] = False
    labels = ids.masked_fill(~counted, -100)
    expected = evaluate_loss(dense, ids, labels)
    found = batches_loss(dense, zip(ids.split(3), counted.split(3), strict=True))
    assert found.tokens == expected.tokens == 3 * 11 + 4
    assert found.nll == pytest.approx(expected.nll, rel=1e-5)
    assert batches_loss(dense, []) == LossSum()
