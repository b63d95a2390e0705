from __future__ import annotations

import pytest
import torch

from configs.choices import ExportFormat
from models.export.flat_layer import flat_layer
from models.export.mixture_format import FORMATS, Shape
from models.families.family import RouterKind
from models.families.table import FAMILIES, router_kind
from tests.support.tiny_graphs import graph_of


@pytest.mark.parametrize("to", FORMATS)
def test_every_format_is_a_family_whose_router_weights_visits_as_the_format_says(to):
    form, graph = FORMATS[to], graph_of(visits=2)
    config = form.config(**form.settings(graph, Shape(4, 2, 16, 32)))
    assert config.model_type in FAMILIES
    kind = router_kind(config)
    assert form.share_of_all == (kind is RouterKind.SOFTMAX_TOP_K)
    assert form.near_exact == (kind is RouterKind.TOP_K_SOFTMAX)
    layer = flat_layer(graph.expert_layers()[0])
    assert form.factor(layer) == (4 if form.share_of_all else 2)
    assert form.model.config_class is form.config


def test_all_mixtures_of_the_choices_have_a_format():
    assert set(FORMATS) == set(ExportFormat) - {ExportFormat.DENSE, ExportFormat.GGUF}


def test_a_constant_gate_halves():
    from models.export.mixture_format import CONSTANT_GATE

    x_TD = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)) * 10
    gate = torch.sigmoid(x_TD @ torch.full((64,), CONSTANT_GATE))
    torch.testing.assert_close(gate, torch.full((100,), 0.5), rtol=2e-4, atol=0)
