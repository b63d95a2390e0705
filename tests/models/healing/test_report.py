from __future__ import annotations

import pytest

from models.healing.report import HeldOutReport
from models.runtime.perplexity import evaluate_loss
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, random_ids


def test_the_dense_model_is_measured_once_and_the_graph_in_each_state():
    dense, graph = tiny_llama(), graph_of(visits=2)
    ids, steps = random_ids(dense), []
    report = HeldOutReport(dense, ids, ids, lambda *done: steps.append(done))
    report.measure(graph, "before")
    graph.lm_head.weight.data *= 1.5
    report.measure(graph, "after")
    figures = report.figures()
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert figures["perplexity"]["dense"] == evaluate_loss(dense, ids, ids).perplexity
    assert figures["perplexity"]["after"] == evaluate_loss(graph, ids, ids).perplexity
    assert figures["perplexity"]["before"] == evaluate_loss(graph_of(visits=2), ids, ids).perplexity
    assert figures["logit_difference"]["before"] < 1e-6
    assert figures["logit_difference"]["after"] == pytest.approx(0.5, rel=1e-3)
    assert figures["evaluation_tokens"] == ids.numel() and figures["evaluation_seconds"] > 0
