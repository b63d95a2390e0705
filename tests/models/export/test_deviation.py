from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from models.export.deviation import (
    Deviation,
    block_logits,
    mean_kl,
    measure_deviation,
    token_deviation,
)
from models.runtime.perplexity import IGNORED, evaluate_loss
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, random_ids


def test_known_values_of_two_tokens():
    expected = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0], [9.0, 9.0]])
    found = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [0.0, 0.0]])
    deviation = token_deviation(expected, found, torch.tensor([1, 0, IGNORED]))
    figures = deviation.figures()
    # KL((1/4, 3/4) || (1/2, 1/2)) and KL((1/2, 1/2) || (3/4, 1/4)).
    first = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    second = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert figures["mean_kl"] == pytest.approx((first + second) / 2, rel=1e-6)
    assert figures["max_logit_difference"] == pytest.approx(math.log(3))
    assert figures["mean_logit_difference"] == pytest.approx(math.log(3) / 2)
    assert figures["argmax_agreement"] == 0.5 and figures["tokens"] == 2
    assert figures["perplexity"]["before"] == pytest.approx(math.sqrt(4 / 3 * 2))
    assert figures["perplexity"]["after"] == pytest.approx(math.sqrt(2 * 4 / 3))


def test_sums_of_texts_add_up():
    logits = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, 2, 3, 4, 5, 6])
    whole = token_deviation(logits[0], logits[1], targets)
    parts = token_deviation(logits[0, :2], logits[1, :2], targets[:2]) + token_deviation(
        logits[0, 2:], logits[1, 2:], targets[2:]
    )
    for name, value in whole.figures().items():
        assert parts.figures()[name] == pytest.approx(value)
    assert (whole + Deviation()) == whole


def test_models_are_compared_on_labeled_tokens_and_perplexity_is_that_of_evaluate():
    one, other = tiny_llama(), tiny_llama(rms_norm_eps=0.5)
    ids = random_ids(one, 3, 20)
    labels = ids.clone()
    labels[1, 7:] = IGNORED
    steps = []
    found = measure_deviation(one, other, ids, labels, on_block=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    for model, loss in ((one, found.before), (other, found.after)):
        expected = evaluate_loss(model, ids, labels)
        assert (loss.tokens, loss.nll) == (expected.tokens, pytest.approx(expected.nll, rel=1e-5))
    with torch.no_grad():
        logits = [model(input_ids=ids).logits[:, :-1] for model in (one, other)]
    kl = F.kl_div(logits[1].log_softmax(-1), logits[0].log_softmax(-1), log_target=True, reduction="none")
    counted = labels[:, 1:] != IGNORED
    assert found.figures()["mean_kl"] == pytest.approx(float(kl.sum(-1)[counted].mean()), rel=1e-4)


def test_a_model_does_not_deviate_from_itself():
    graph = graph_of(visits=2)
    ids = random_ids(graph)
    expected = list(block_logits(graph, ids))
    assert [tuple(each.shape) for each in expected] == [(48, 64)] * 4
    assert mean_kl(expected, graph, ids) == pytest.approx(0, abs=1e-12)
    figures = measure_deviation(graph, graph, ids, ids).figures()
    assert figures["max_logit_difference"] == 0 and figures["argmax_agreement"] == 1
