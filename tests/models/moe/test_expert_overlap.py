"""Visits of experts noted beside saliency."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.errors import UserError
from experts.merging.similarity import jaccard
from experts.saliency.measures import ARRAYS
from models.moe.expert_overlap import collect_overlap
from models.moe.saliency_collection import collect_saliency
from models.moe.views import moe_layers
from tests.conftest import tiny_llama
from tests.models.moe.test_saliency_collection import batches_of, block_inputs
from tests.support.module_moe import with_module_experts
from tests.support.tiny_graphs import graph_of
from tests.support.tiny_moes import FAMILIES, tiny_moe


@torch.no_grad()
def plain_visits(model, batches):
    """Per layer and expert the set of (batch, token) that transformers' own router sends to it."""
    layers = moe_layers(model)
    visits = [[set() for _ in range(layer.num_experts)] for layer in layers]
    for batch, (input_ids, token_mask) in enumerate(batches):
        for layer, x_TD in zip(layers, block_inputs(model, input_ids), strict=True):
            _, _, experts_TK = layer.router(x_TD)
            for token in token_mask.flatten().nonzero().flatten().tolist():
                for expert in experts_TK[token].tolist():
                    visits[layer.ordinal][expert].add((batch, token))
    return visits


@pytest.mark.parametrize("family", FAMILIES)
def test_jaccard_of_noted_visits_is_that_of_the_routers(family):
    model = tiny_moe(family)
    saliency, visits = collect_overlap(model, batches_of(model, padding=3))
    for found, sets in zip(visits, plain_visits(model, batches_of(model, padding=3)), strict=True):
        expected = [[len(a & b) / len(a | b) if a | b else 0.0 for b in sets] for a in sets]
        np.testing.assert_allclose(jaccard(found), expected)
    assert saliency.provenance == {"tokens": 6 * 9}


@pytest.mark.parametrize("make", [lambda: graph_of(visits=2), lambda: with_module_experts(tiny_moe("olmoe"))])
def test_every_visit_that_saliency_counts_is_one_bit(make):
    model = make()
    seen = []
    saliency, visits = collect_overlap(model, batches_of(model, padding=3), on_batch=seen.append)
    bits = [np.bitwise_count(packed).sum(axis=1) for packed in visits]
    np.testing.assert_array_equal(bits, saliency.freq)
    expected = collect_saliency(model, batches_of(model, padding=3))
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(saliency, name), getattr(expected, name))
    assert seen == [1, 2, 3]


def test_no_text_and_no_experts_are_refused():
    with pytest.raises(UserError, match="no token"):
        collect_overlap(tiny_moe("mixtral"), [])
    with pytest.raises(UserError, match="expected a model with experts"):
        collect_overlap(tiny_llama(), [])
