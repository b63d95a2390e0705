from __future__ import annotations

import pytest
import torch

from configs.choices import ExportFormat
from configs.errors import UserError
from models.export.deviation import Deviation
from models.export.mixture_format import FORMATS
from models.export.pipeline import (
    ExportOptions,
    ExportText,
    check_divergence,
    export_graph,
    round_weights,
)
from models.runtime.perplexity import LossSum, evaluate_loss
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, random_ids, shared_graph_of


def text_of(graph) -> ExportText:
    """Random tokens for the choice and for the comparison."""
    ids = random_ids(graph, seed=1)
    return ExportText(random_ids(graph, 2), ids, ids)


@pytest.mark.parametrize("to", [ExportFormat.DENSE, *FORMATS])
def test_an_export_reports_its_own_deviation(to):
    graph = graph_of(visits=2)
    text, steps = text_of(graph), []
    found = export_graph(graph, text, ExportOptions(to), lambda *step: steps.append(step))
    figures = found.figures()
    assert figures["exact"] and figures["not_representable"] == []
    near_exact = to == ExportFormat.DENSE or FORMATS[to].near_exact
    assert figures["mean_kl"] < (1e-9 if near_exact else 1e-2)
    assert figures["perplexity"]["after"] == pytest.approx(
        evaluate_loss(found.model, text.input_ids, text.labels).perplexity, rel=1e-5
    )
    assert ("comparing", 4, 4) in steps
    if to == ExportFormat.DENSE:
        assert found.exponent is None and [layer.num_visits for layer in graph.expert_layers()] == [2, 2]
    else:
        assert any(stage.startswith("choosing") for stage, _, _ in steps)
        assert (found.exponent >= 16) == FORMATS[to].near_exact


def test_a_given_exponent_is_kept_and_costs_what_it_costs():
    graph = graph_of(visits=2)
    found = export_graph(graph, text_of(graph), ExportOptions(ExportFormat.MIXTRAL, exponent=1))
    assert found.exponent == 1 and found.figures()["mean_kl"] > 1e-3


def test_what_is_lost_is_named_and_measured():
    graph = shared_graph_of()
    found = export_graph(graph, text_of(graph), ExportOptions(ExportFormat.QWEN2_MOE))
    assert found.not_representable == ["default outputs of experts that a token does not visit: layers 0, 1"]
    assert not found.figures()["exact"] and found.figures()["mean_kl"] > 1e-3


@pytest.mark.parametrize("to", [ExportFormat.DENSE, *FORMATS])
def test_weights_have_the_values_of_the_written_dtype(to):
    graph = graph_of(visits=2)
    found = export_graph(graph, text_of(graph), ExportOptions(to, torch.bfloat16))
    for name, values in found.model.named_parameters():
        assert values.dtype == torch.float32 and torch.equal(values, values.bfloat16().float()), name


def test_rounding_keeps_the_dtype():
    model = tiny_llama()
    before = model.lm_head.weight.clone()
    round_weights(model, torch.float16)
    assert model.dtype == torch.float32 and torch.equal(model.lm_head.weight, before.half().float())


def test_a_divergence_above_the_bound_is_refused():
    deviation = Deviation(before=LossSum(1.0, 10), kl=0.2)
    check_divergence(deviation, None)
    check_divergence(deviation, 0.02)
    with pytest.raises(UserError, match=r"at most 0\.01 nats per token, got 0\.02; nothing was written"):
        check_divergence(deviation, 0.01)
    with pytest.raises(UserError, match="got nan"):
        check_divergence(Deviation(before=LossSum(1.0, 10), kl=float("nan")), 0.01)
