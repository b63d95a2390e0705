"""Runtime settings of a loaded graph: observers, walk, visits per token, residents. Weights do not change."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from configs.errors import UserError
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.remote_code.routing_fedgraft import Walk

Observer = Callable[[ExpertGraphMLP, Tensor, Walk, Tensor], None]


@contextmanager
def observing_walks(model: FedGraftForCausalLM, make: Callable[[int], Observer]) -> Iterator[None]:
    """Context in which the observer ``make(layer index)`` is called with the walks of every layer.

    Contexts may be nested: every observer of a layer is called, the outermost first.
    """
    layers = model.expert_layers()
    earlier = [layer.observers for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.observers = [*layer.observers, make(index)]
        yield
    finally:
        _set_observers(model, earlier)


@contextmanager
def unobserved(model: FedGraftForCausalLM) -> Iterator[None]:
    """Context without observers, e.g. for the recomputation of a checkpointed forward pass."""
    earlier = [layer.observers for layer in model.expert_layers()]
    try:
        _set_observers(model, [[] for _ in earlier])
        yield
    finally:
        _set_observers(model, earlier)


@contextmanager
def checkpointing(model: FedGraftForCausalLM) -> Iterator[None]:
    """Context with activation checkpointing: only layer inputs are saved, and the backward pass recomputes layers.

    Effective in training mode. Observers are not called in the recomputation, so that visits count once.
    """
    contexts = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), unobserved(model))}
    model.activation_checkpointing_enable(contexts)
    model.disable_input_require_grads()  # non-reentrant checkpoints need no gradient of their input
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def _set_observers(model: FedGraftForCausalLM, observers: Sequence[list[Observer]]) -> None:
    for layer, each in zip(model.expert_layers(), observers, strict=True):
        layer.observers = each


def set_visits(model: PreTrainedModel, count: int) -> None:
    """Set the experts per token to ``count`` in every layer, or to E in layers with fewer experts.

    Raises:
        UserError: not an expert graph, a count that exceeds the experts of every layer, or one below the shared
            experts, which every token visits.
    """
    if not isinstance(model, FedGraftForCausalLM):
        raise UserError(
            "expected an expert graph to set the experts per token, got a dense model; leave the option out"
        )
    least, most = fewest_residents(model.config), max(layer.num_experts for layer in model.expert_layers())
    if not least <= count <= most:
        shared = "" if least == 1 else f", {least} of them shared"
        raise UserError(f"expected experts per token between {least} and {most}{shared}, got {count}")
    for layer in model.expert_layers():
        layer.num_visits = min(count, layer.num_experts)
    model.config.experts_per_token = count


@contextmanager
def visiting(model: FedGraftForCausalLM, visits: Sequence[int]) -> Iterator[None]:
    """Context with ``visits[layer]`` experts per token."""
    layers = model.expert_layers()
    usual = [layer.num_visits for layer in layers]
    try:
        for layer, count in zip(layers, visits, strict=True):
            layer.num_visits = count
        yield
    finally:
        for layer, count in zip(layers, usual, strict=True):
            layer.num_visits = count


def set_walk(model: FedGraftForCausalLM, order: str) -> None:
    """Set the walk order, ``best-first`` or ``depth-first``."""
    for layer in model.expert_layers():
        layer.order = order
    model.config.walk = order


def residents(model: FedGraftForCausalLM) -> list[Tensor]:
    """Masks of the experts that tokens may visit, per layer bool ``[E]``."""
    return [
        torch.ones_like(layer.edges[0]) if layer.resident is None else layer.resident
        for layer in model.expert_layers()
    ]


def held_experts(layer: ExpertGraphMLP, resident: Tensor | None) -> list[int]:
    """Indices of the experts in the mask ``resident`` (bool ``[E]``), ascending; all for None."""
    return list(range(layer.num_experts)) if resident is None else resident.nonzero().flatten().tolist()


def fewest_residents(config: PreTrainedConfig) -> int:
    """Smallest budget, and smallest number of experts per token: one, or all shared experts of a layer."""
    return max([1, *config.num_shared])


def set_residents(model: FedGraftForCausalLM, held: Sequence[Tensor | None]) -> None:
    """Restrict visits to the experts ``held``, per layer bool ``[E]``, or None for all."""
    for layer, resident in zip(model.expert_layers(), held, strict=True):
        layer.resident, layer.residency_gate = resident, None


def warn_where_fewer_reside(model: FedGraftForCausalLM) -> None:
    """Warn once per process if a layer has fewer residents than experts per token."""
    for layer, held in zip(model.expert_layers(), residents(model), strict=True):
        if int(held.sum()) < layer.num_visits:
            warnings.warn(
                f"expected at least {layer.num_visits} experts to visit in layer {layer.layer_index}, "
                f"got {int(held.sum())} residents; tokens visit only these",
                stacklevel=2,
            )
            return


def scaled_visits(model: FedGraftForCausalLM, budget: int) -> list[int]:
    """Experts per token of a client with this budget, per layer: k scaled by budget / E, at least one.

    Shared experts are visited in any case; the routed part of k is scaled by the routed part of the budget.
    """
    visits = []
    for layer in model.expert_layers():
        shared = min(layer.num_shared, budget) if budget > 0 else layer.num_shared
        routed = layer.num_experts - layer.num_shared
        held = min(budget, layer.num_experts) - shared if budget > 0 else routed
        share = held / routed if routed else 0.0
        visits.append(max(1, shared + round((layer.num_visits - layer.num_shared) * share)))
    return visits


@contextmanager
def frozen(model: FedGraftForCausalLM) -> Iterator[None]:
    """Context in which no parameter of the model requires a gradient."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def gating(model: FedGraftForCausalLM) -> Iterator[None]:
    """Context that removes the residency gates of all layers on exit."""
    try:
        yield
    finally:
        for layer in model.expert_layers():
            layer.residency_gate = None
