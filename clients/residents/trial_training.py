"""Which of several sets of residents trains best: a few steps with each, all of them taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from clients.training.trainer import Batch, LocalTraining, train_locally
from models.graph.runtime_settings import set_residents
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

Residents = Sequence[Tensor | None]


def best_residents(
    model: FedGraftForCausalLM,
    candidates: Sequence[Residents],
    batches: Sequence[Batch],
    training: LocalTraining,
    *,
    hold: Callable[[FedGraftForCausalLM, Residents], None] = set_residents,
) -> int:
    """Train on ``batches`` with each candidate and return the one with the lowest loss over the second half of them.

    What a mask costs before training says little about what it costs after: the loss of a few real steps says more.
    On ties the first candidate wins. The model is left with the residents, the weights and the storage that it had.

    Args:
        model: in memory, or opened over experts on disk.
        candidates: per layer bool ``[E]``, None for all; at least one.
        batches: what each candidate trains on, a step each; without any the first candidate is returned.
        training: its learning rate and optimizer; its steps and schedule do not count.
        hold: makes the model hold a candidate, e.g. ``disk_experts.materialize`` for experts on disk.
    """
    trial = replace(
        training,
        local_steps=len(batches),
        schedule="constant",
        warmup_steps=0,
        accumulation_steps=1,
        keep_moments=False,
    )
    losses = []
    for candidate in candidates if batches else []:
        with _taken_back(model):
            hold(model, candidate)
            result = train_locally(model, iter(batches), trial)
        losses.append(fmean(result.losses[len(batches) // 2 :]))
    return losses.index(min(losses)) if losses else 0


@contextmanager
def _taken_back(model: FedGraftForCausalLM) -> Iterator[None]:
    """Put residents, storage, and every parameter of the expert layers back at the end."""
    layers = model.expert_layers()
    kept = [
        (
            layer.resident,
            layer.storage,
            {name: each.detach().clone() for name, each in layer.named_parameters()},
        )
        for layer in layers
    ]
    trains = [parameter.requires_grad for parameter in model.parameters()]
    try:
        yield
    finally:
        for layer, (resident, storage, values) in zip(layers, kept, strict=True):
            layer.resident = resident
            if storage is not None:
                layer.keep_in(storage)
            with torch.no_grad():
                for name, parameter in layer.named_parameters():
                    parameter.copy_(values[name])
        for parameter, flag in zip(model.parameters(), trains, strict=True):
            parameter.requires_grad_(flag)
