from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from configs.errors import UserError
from models.bootstrap.fisher import output_metrics
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import random_ids


@pytest.fixture(scope="module")
def dense():
    return tiny_llama()


def moment_of_an_added_error(dense, ids, layer):
    """Second moment of the loss's gradient with respect to an error that is added to the layer's output."""
    error = torch.zeros(*ids.shape, 32, requires_grad=True)
    handle = dense.model.layers[layer].mlp.register_forward_hook(lambda _, __, output: output + error)
    logits = dense(input_ids=ids).logits[:, :-1].flatten(0, 1)
    handle.remove()
    drawn = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(5)).squeeze(-1)
    F.cross_entropy(logits, drawn, reduction="sum").backward()
    return sum(torch.outer(row, row) for row in error.grad.flatten(0, 1))


def test_the_metric_is_the_second_moment_of_the_gradient_of_drawn_labels(dense):
    ids = random_ids(dense, 3, 12)
    metrics = output_metrics(dense, ids, seed=5, batch_size=3)
    for layer, metric in enumerate(metrics):
        moment = moment_of_an_added_error(dense, ids, layer)
        expected = moment / moment.diagonal().mean() + torch.eye(32)
        torch.testing.assert_close(metric, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_are_left_as_they_were(frozen):
    model, ids = tiny_llama().requires_grad_(not frozen), random_ids(tiny_llama(), 2, 8)
    metrics = output_metrics(model, ids)
    assert all(p.grad is None and p.requires_grad == (not frozen) for p in model.parameters())
    assert not any(layer.mlp._forward_hooks for layer in model.model.layers)
    for one, other in zip(metrics, output_metrics(tiny_llama(), ids), strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_it_works_without_gradients_outside_and_in_bf16(dense):
    model, ids = tiny_llama().to(torch.bfloat16), random_ids(dense, 8, 16)
    for metric in output_metrics(model, ids):
        assert metric.dtype == torch.float32 and torch.linalg.cholesky_ex(metric).info == 0
        assert metric.diagonal().mean() == pytest.approx(2, rel=1e-4)


def test_a_layer_that_the_loss_does_not_depend_on_is_measured_by_the_norm(dense):
    deaf = tiny_llama()
    torch.nn.init.zeros_(deaf.lm_head.weight)
    for metric in output_metrics(deaf, random_ids(dense, 2, 8)):
        torch.testing.assert_close(metric, 2 * torch.eye(32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(dense, bad):
    damaged = tiny_llama()
    with torch.no_grad():
        damaged.model.layers[1].mlp.up_proj.weight[3, 4] = bad
    with pytest.raises(UserError, match="finite"):
        output_metrics(damaged, random_ids(dense, 2, 8))
