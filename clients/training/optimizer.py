"""Optimizer of local training and its learning-rate schedule over the whole run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from configs.run_views import OptimizerName, ScheduleName


def make_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    name: OptimizerName,
    learning_rate: float,
    weight_decay: float,
    momentum: float,
) -> Optimizer:
    """Build the optimizer of ``parameters``.

    Adafactor (Shazeer and Stern, 2018, arXiv:1804.04235) uses the given learning rate without its relative scaling by
    the parameter's magnitude, which is zero for gains at the start.

    Args:
        parameters: trained parameters, or groups of them as torch's optimizers take them.
        name: ``adamw``, ``adafactor`` or ``sgd``.
        learning_rate: base rate of the schedule.
        weight_decay: decoupled from the gradient with adamw and adafactor, added to it with sgd.
        momentum: momentum of sgd.
    """
    if name == "adafactor":
        # Imported here: it imports bitsandbytes and torch's compiler, seconds in the new process of each message.
        from transformers.optimization import Adafactor

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
    """Build the learning-rate schedule of the run, positioned at step ``first_step``.

    Clients keep no optimizer between rounds, so that each round enters the schedule where the previous one ended.

    Args:
        optimizer: new optimizer.
        name: ``constant``, ``linear`` or ``cosine``.
        warmup_steps: steps of the run before the first at the full rate.
        first_step: steps of the run before this round.
        total_steps: steps of the run, after which linear and cosine reach 0.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # required by schedules that start at a later step
    # Offset by one step: the first warm-up step has a rate of zero, so that a client with a single step in its round
    # would not train.
    warmup, total = warmup_steps + 1, total_steps + 1
    factor = partial(_rate, name=name, warmup=warmup, total=total)
    return LambdaLR(optimizer, factor, last_epoch=first_step)


def _rate(step: int, *, name: ScheduleName, warmup: int, total: int) -> float:
    """Learning rate of a step over the base rate, as transformers' schedules with warm-up have it."""
    if step < warmup:
        return step / warmup
    if name == "constant":
        return 1.0
    span = max(1, total - warmup)
    if name == "linear":
        return max(0.0, (total - step) / span)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / span)))
