"""How a loaded graph runs: settings that leave its weights alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.errors import UserError
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.remote_code.routing_fedgraft import Walk

Observer = Callable[[ExpertGraphMLP, Tensor, Walk, Tensor], None]


@contextmanager
def observing_walks(model: FedGraftForCausalLM, make: Callable[[int], Observer]) -> Iterator[None]:
    """Let ``make(layer index)`` see the walks of every layer, for the time of the block.

    Blocks may be nested: every observer of a layer is called, the outermost first.
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
    """Call no observer within the block, e.g. while a forward pass is repeated for its gradient."""
    earlier = [layer.observers for layer in model.expert_layers()]
    try:
        _set_observers(model, [[] for _ in earlier])
        yield
    finally:
        _set_observers(model, earlier)


@contextmanager
def checkpointing(model: FedGraftForCausalLM) -> Iterator[None]:
    """Keep only the input of each decoder layer within the block, and run the layer again in the backward pass.

    Works in training mode. Observers do not see the repetition, which would be counted twice.
    """
    contexts = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), unobserved(model))}
    model.activation_checkpointing_enable(contexts)
    model.disable_input_require_grads()  # these checkpoints do without a gradient of their input
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def _set_observers(model: FedGraftForCausalLM, observers: Sequence[list[Observer]]) -> None:
    for layer, each in zip(model.expert_layers(), observers, strict=True):
        layer.observers = each


def set_visits(model: PreTrainedModel, count: int) -> None:
    """Let each token visit ``count`` experts in every layer (all of them where a layer has fewer).

    Raises:
        UserError: the model is no expert graph, or no layer has so many experts.
    """
    if not isinstance(model, FedGraftForCausalLM):
        raise UserError(
            "expected an expert graph to set the experts per token, got a dense model; leave the option out"
        )
    most = max(layer.num_experts for layer in model.expert_layers())
    if not 1 <= count <= most:
        raise UserError(f"expected experts per token between 1 and {most}, got {count}")
    for layer in model.expert_layers():
        layer.num_visits = min(count, layer.num_experts)
    model.config.experts_per_token = count


@contextmanager
def visiting(model: FedGraftForCausalLM, visits: Sequence[int]) -> Iterator[None]:
    """Let each token visit ``visits[layer]`` experts, for the time of the block."""
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


def held_experts(layer: ExpertGraphMLP, resident: Tensor | None) -> list[int]:
    """The experts of a layer that ``resident`` (bool ``[E]``) marks, in order; all for None."""
    return list(range(layer.num_experts)) if resident is None else resident.nonzero().flatten().tolist()


def set_residents(model: FedGraftForCausalLM, held: Sequence[Tensor | None]) -> None:
    """Let tokens visit only the experts ``held``, per layer bool ``[E]``, or None for all."""
    for layer, resident in zip(model.expert_layers(), held, strict=True):
        layer.resident, layer.residency_gate = resident, None


def warn_where_fewer_reside(model: FedGraftForCausalLM) -> None:
    """Warn, once a process, that tokens visit fewer experts than they should because fewer are held."""
    for layer, held in zip(model.expert_layers(), residents(model), strict=True):
        if int(held.sum()) < layer.num_visits:
            warnings.warn(
                f"expected at least {layer.num_visits} experts to visit in layer {layer.layer_index}, "
                f"got {int(held.sum())} that are held; tokens visit these",
                stacklevel=2,
            )
            return


def scaled_visits(model: FedGraftForCausalLM, budget: int) -> list[int]:
    """Experts per token for a client of this budget, per layer: the graph's k in proportion, at least one."""
    visits = []
    for layer in model.expert_layers():
        share = min(budget, layer.num_experts) / layer.num_experts if budget > 0 else 1.0
        visits.append(max(1, round(layer.num_visits * share)))
    return visits


@contextmanager
def frozen(model: FedGraftForCausalLM) -> Iterator[None]:
    """No parameter of the model requires a gradient within the block."""
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
    """Gates that are put on experts within the block are taken off after it, also after an error."""
    try:
        yield
    finally:
        for layer in model.expert_layers():
            layer.residency_gate = None
