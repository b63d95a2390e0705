from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import nn
from transformers import get_scheduler
from transformers.optimization import Adafactor

from clients.training import optimizer as module
from configs.run_views import OptimizerName, ScheduleName

OPTIMIZERS, SCHEDULES = get_args(OptimizerName), get_args(ScheduleName)


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, 4, 5, generator=generator)), nn.Parameter(torch.zeros(4))]


def make_optimizer(parameters, **options):
    return module.make_optimizer(
        parameters, **{"name": "adamw", "weight_decay": 0.0, "momentum": 0.9, **options}
    )


def make_schedule(optimizer, **options):
    return module.make_schedule(
        optimizer, **{"name": "constant", "warmup_steps": 0, "first_step": 0, **options}
    )


def rates(steps: int, **options) -> list[float]:
    """The learning rates of ``steps`` steps from an optimizer whose own rate is 2."""
    optimizer = make_optimizer(weights(), name="sgd", learning_rate=2.0)
    schedule = make_schedule(optimizer, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_each_name_makes_its_optimizer():
    made = {
        name: type(make_optimizer(weights(), name=name, learning_rate=1.0)).__name__ for name in OPTIMIZERS
    }
    assert made == {"adamw": "AdamW", "adafactor": "Adafactor", "sgd": "SGD"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_means_the_same_for_parameters_at_zero(name):
    one, zero = weights()
    optimizer = make_optimizer([one, zero], name=name, learning_rate=0.25, momentum=0.0)
    for parameter in (one, zero):
        parameter.grad = torch.ones_like(parameter)
    before = one.detach().clone()
    optimizer.step()
    assert torch.allclose(before - one, torch.tensor(0.25), atol=1e-4)
    assert torch.allclose(zero, torch.tensor(-0.25), atol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_has_no_gradient_stays_where_it_is(name):
    weight, _ = weights()
    optimizer = make_optimizer([weight], name=name, learning_rate=0.1)
    before = weight.detach().clone()
    for step in range(3):
        weight.grad = torch.zeros_like(weight)
        weight.grad[0] = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    assert torch.equal(weight[1:], before[1:]) and not torch.equal(weight[0], before[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_shrinks_weights(name):
    weight, _ = weights()
    optimizer = make_optimizer([weight], name=name, learning_rate=0.1, weight_decay=0.5)
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * 0.95)


def test_adafactor_keeps_rows_and_columns_only():
    weight, _ = weights()
    optimizer = make_optimizer([weight], name="adafactor", learning_rate=0.1)
    assert isinstance(optimizer, Adafactor)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if torch.is_tensor(value) and value.ndim]
    assert sum(value.numel() for value in kept) == 3 * 4 + 3 * 5


def test_groups_keep_their_own_rates():
    one, zero = weights()
    groups = [{"params": [one], "lr": 1.0}, {"params": [zero], "lr": 4.0}]
    optimizer = make_optimizer(groups, learning_rate=9.0)
    make_schedule(optimizer, name="linear", first_step=1, total_steps=4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.75, 3.0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warm_up_schedules_are_those_of_transformers(name):
    optimizer = make_optimizer(weights(), name="sgd", learning_rate=2.0)
    reference = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=7)
    expected = []
    for _ in range(7):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert rates(7, name=name, total_steps=7) == pytest.approx(expected)


def test_the_rate_rises_then_falls():
    expected = [0.5, 1.0, 1.5, 2.0, 1.5, 1.0, 0.5]
    assert rates(7, name="linear", warmup_steps=3, total_steps=7) == pytest.approx(expected)
    assert rates(5, name="constant", warmup_steps=3, total_steps=5) == [0.5, 1.0, 1.5, 2.0, 2.0]
    halfway = rates(7, name="cosine", warmup_steps=3, total_steps=7)[5]
    assert halfway == pytest.approx(2 * 0.5 * (1 + math.cos(math.pi * 2 / 4)))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 2, 5])
def test_rounds_continue_one_schedule(name, warmup_steps):
    options = {"name": name, "warmup_steps": warmup_steps, "total_steps": 12}
    rounds = [rates(3, first_step=first, **options) for first in (0, 3, 6, 9)]
    assert sum(rounds, []) == pytest.approx(rates(12, **options))


def test_steps_beyond_the_end_have_no_rate():
    assert rates(2, name="linear", first_step=4, total_steps=4) == [0.0, 0.0]
