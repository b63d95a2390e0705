"""How a loaded graph runs: settings that leave its weights alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from models.experts_fedgraft import ExpertGraphMLP
from models.modeling_fedgraft import FedGraftForCausalLM
from models.routing_fedgraft import Walk

Observer = Callable[[ExpertGraphMLP, Tensor, Walk, Tensor], None]


@contextmanager
def observing(model: FedGraftForCausalLM, make: Callable[[int], Observer]) -> Iterator[None]:
    """Let ``make(layer index)`` see the walks of every layer, for the time of the block."""
    layers = model.expert_layers()
    try:
        for index, layer in enumerate(layers):
            layer.observer = make(index)
        yield
    finally:
        for layer in layers:
            layer.observer = None


def set_walk(model: FedGraftForCausalLM, order: str) -> None:
    """Walk in another order, ``best-first`` or ``depth-first``."""
    for layer in model.expert_layers():
        layer.order = order
    model.config.walk = order


def residents(model: FedGraftForCausalLM) -> list[Tensor]:
    """The experts that tokens may visit, per layer bool ``[E]``."""
    return [
        torch.ones_like(layer.edges[0]) if layer.resident is None else layer.resident
        for layer in model.expert_layers()
    ]


def set_residents(model: FedGraftForCausalLM, held: Sequence[Tensor | None]) -> None:
    """Let tokens visit only the experts ``held``, per layer bool ``[E]``, or None for all."""
    for layer, resident in zip(model.expert_layers(), held, strict=True):
        layer.resident, layer.residency_gate = resident, None


def scaled_visits(model: FedGraftForCausalLM, budget: int) -> list[int]:
    """Experts per token for a client of this budget, per layer: the graph's k in proportion, at least one."""
    visits = []
    for layer in model.expert_layers():
        share = min(budget, layer.num_experts) / layer.num_experts if budget > 0 else 1.0
        visits.append(max(1, round(layer.num_visits * share)))
    return visits
