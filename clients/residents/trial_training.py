"""Choice among sets of resident experts by trial training: a few steps with each, all reverted."""

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
    """Index of the candidate with the lowest mean loss over the second half of ``batches``, a training step each.

    The loss before training predicts the loss after training poorly; that of a few steps predicts it better. Among
    equal losses the first candidate is returned. Residents, weights and storage of the model are restored.

    Args:
        model: graph in memory, or with its experts on disk.
        candidates: at least one set of residents, per layer bool ``[E]``; None: all.
        batches: training batches, a step each; empty: the first candidate is returned.
        training: learning rate and optimizer; its steps and schedule are ignored.
        hold: sets the residents of the model, e.g. ``disk_experts.materialize`` for experts on disk.
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
        with _reverted(model):
            hold(model, candidate)
            result = train_locally(model, iter(batches), trial)
        losses.append(fmean(result.losses[len(batches) // 2 :]))
    return losses.index(min(losses)) if losses else 0


@contextmanager
def _reverted(model: FedGraftForCausalLM) -> Iterator[None]:
    """Restore residents, storage and parameters of the expert layers at the end."""
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
