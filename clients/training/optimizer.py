"""The optimizer of local training, and its learning rate over the whole run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.optimization import (
    Adafactor,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from configs.run_views import OptimizerName, ScheduleName


def make_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    name: OptimizerName,
    learning_rate: float,
    weight_decay: float,
    momentum: float,
) -> Optimizer:
    """A fresh optimizer of ``parameters``.

    Adafactor (Shazeer and Stern, 2018, arXiv:1804.04235) runs with the given learning rate in place of its own, so
    that the rate means the same for every parameter: gains start at zero, which its own would scale by.

    Args:
        parameters: what trains, or groups of it as torch's optimizers take them.
        name: ``adamw``, ``adafactor`` or ``sgd``.
        learning_rate: before any schedule.
        weight_decay: decoupled from the gradient with adamw and adafactor, added to it with sgd.
        momentum: of sgd.
    """
    if name == "adafactor":
        return Adafactor(
            parameters,
            lr=learning_rate,
            weight_decay=weight_decay,
            scale_parameter=False,
            relative_step=False,
        )
    if name == "sgd":
        return SGD(parameters, lr=learning_rate, weight_decay=weight_decay, momentum=momentum)
    return AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)


def make_schedule(
    optimizer: Optimizer,
    *,
    name: ScheduleName,
    warmup_steps: int,
    first_step: int,
    total_steps: int,
) -> LRScheduler:
    """Set the learning rate of ``optimizer`` to that of step ``first_step``; ``step()`` moves it on.

    Clients keep no optimizer between rounds, so a round enters the schedule of the run where the last one left it.

    Args:
        optimizer: fresh.
        name: ``constant``, ``linear`` or ``cosine``.
        warmup_steps: steps of the run before the one that first has the full rate.
        first_step: steps of the run before these.
        total_steps: steps of the run, after which linear and cosine reach 0.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # a schedule that starts at a later step asks for it
    # One step into schedules one step longer: their first warm-up step has a rate of zero, and a client that takes no
    # other step in its round would have trained for nothing.
    warmup, total = warmup_steps + 1, total_steps + 1
    if name == "linear":
        return get_linear_schedule_with_warmup(optimizer, warmup, total, last_epoch=first_step)
    if name == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, warmup, total, last_epoch=first_step)
    return get_constant_schedule_with_warmup(optimizer, warmup, last_epoch=first_step)
