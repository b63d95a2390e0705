from __future__ import annotations

from itertools import repeat

import pytest
import torch

from clients.training.gradient_rms import entry_gradient_rms, second_moments
from clients.training.optimizer import make_optimizer
from clients.training.starting_point import resident_units
from clients.training.trainer import train_locally
from models.graph.expert_modules import materialize_modules
from models.graph.lora import attach_lora
from models.graph.runtime_settings import residents, set_residents
from models.graph.unit_vectors import read_unit, unit_sizes
from tests.support.local_training import local_training
from tests.support.tiny_graphs import graph_of, random_ids, with_random_gains


@pytest.fixture
def model():
    graph = with_random_gains(graph_of(visits=2))
    set_residents(
        graph, [torch.tensor([True, False, True, False]), torch.tensor([False, False, False, True])]
    )
    return graph


def _train(model, **changes):
    ids = random_ids(model, 4, 16)
    training = local_training(**{"local_steps": 1, "keep_moments": True} | changes)
    return train_locally(model, repeat((ids, ids)), training)


def test_after_one_step_slopes_are_proportional_to_the_gradient(model):
    ids = random_ids(model, 4, 16)
    slopes = entry_gradient_rms(model, _train(model, learning_rate=1e-12, max_grad_norm=0.0).moments)
    for layer in model.expert_layers():
        layer.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {
        id(layer): {name: parameter.grad for name, parameter in layer.named_parameters()}
        for layer in model.expert_layers()
    }
    for layer in model.expert_layers():
        for name, parameter in layer.named_parameters():
            gradient = gradients[id(layer)][name]
            parameter.data = torch.zeros_like(parameter) if gradient is None else gradient.abs()
    assert list(slopes) == resident_units(model)
    for unit, slope in slopes.items():
        # Adam's running mean is (1 - beta2) of the first squared gradient.
        torch.testing.assert_close(slope, read_unit(model, unit) * 0.001**0.5, rtol=1e-3, atol=1e-9)
        assert slope.shape == (unit_sizes(model)[unit],) and slope.any()


def test_what_did_not_train_has_no_slope(model):
    slopes = entry_gradient_rms(model, _train(model, train="experts").moments)
    layer = model.expert_layers()[0]
    routing = 2 * layer.num_experts + 1 + layer.hidden_size
    for slope in slopes.values():
        assert not slope[-routing:].any() and slope[:-routing].any()


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
def test_other_optimizers_know_no_slopes(model, optimizer):
    result = _train(model, optimizer=optimizer)
    assert result.moments == {}
    assert entry_gradient_rms(model, result.moments) == {}


def test_lora_factors_have_none():
    graph = graph_of(visits=2)
    materialize_modules(graph, residents(graph), kind="plain", dtype=torch.float32)
    attach_lora(graph, rank=2, alpha=4, attention=False, seed=0)
    assert entry_gradient_rms(graph, _train(graph).moments) == {}


def test_second_moments_of_an_optimizer_that_has_not_stepped():
    assert (
        second_moments(
            make_optimizer(
                [torch.nn.Parameter(torch.zeros(2))],
                name="adamw",
                learning_rate=0.1,
                weight_decay=0.0,
                momentum=0.0,
            )
        )
        == {}
    )


def test_moments_are_kept_only_on_request(model):
    assert _train(model, keep_moments=False).moments == {}
