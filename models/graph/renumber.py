"""Change of the experts of an opened graph: spawned, removed and renumbered ones, in memory or on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from experts.graph.edit_plan import AppliedPlan
from experts.graph.expert_graph import ExpertGraph
from models.graph.graph_state import write_graph
from models.graph.unit_vectors import Unit
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

# Attributes of a layer that edits overwrite, and those that they replace.
_SMALL = ("output_gain", "edge_gain", "edge_affinity", "edges", "neurons")
_KEPT = ("gate_up_proj", "down_proj", "held", "storage", "attached", "ids", "num_visits")
_KEYS = ("num_experts", "default_experts", "attached_experts", "graph_version")


class SavedLayers(NamedTuple):
    """Graph of an opened model, as ``saved_layers`` returns it: configuration keys and, per layer, its tensors."""

    config: dict[str, Any]
    layers: list[tuple[Tensor, dict[str, Tensor], dict[str, Any]]]


@torch.no_grad()
def write_plan(model: FedGraftForCausalLM, plan: AppliedPlan) -> set[Unit]:
    """Bring a model to the graph after a plan; returns the spawned experts.

    A spawned expert has its parent's gate and up projections and router row, and a down projection of zero.

    Args:
        model: model with the graph before the plan, its experts in memory or in a storage that is written to.
        plan: applied plan.
    """
    renumber_experts(model, plan.origins)
    spawned = set()
    for index, (layer, parents) in enumerate(zip(model.expert_layers(), plan.parents, strict=True)):
        for expert, parent in parents.items():
            gate_up, down = layer.read_expert(parent)
            layer.write_expert(expert, gate_up, torch.zeros_like(down))
            layer.router.weight[expert] = layer.router.weight[parent]
            spawned.add((index, expert))
    write_graph(model, plan.graph)
    return spawned


def renumber_experts(model: FedGraftForCausalLM, origins: Sequence[np.ndarray]) -> None:
    """Select and reorder the experts of every layer; edges of changed layers are cleared until ``write_graph``.

    Args:
        model: changed in place.
        origins: per layer int64 ``[E']``, present number of each expert; -1: a new expert of zeros.
    """
    layers = model.expert_layers()
    for layer, origin in zip(layers, origins, strict=True):
        if not np.array_equal(origin, np.arange(layer.num_experts)):
            renumber_layer(layer, origin)
    config, counts = model.config, [layer.num_experts for layer in layers]
    if config.default_rank:
        fitted = list(config.default_experts or config.num_experts)
        config.default_experts = None if fitted == counts else fitted
    config.num_experts = counts


@torch.no_grad()
def renumber_layer(layer: ExpertGraphMLP, origin: np.ndarray) -> None:
    """Select and reorder the experts of one layer; its edges are cleared, and no expert is attached.

    Args:
        layer: changed in place.
        origin: int64 ``[E']``, present number of each expert; -1: a new expert of zeros.

    Raises:
        ValueError: the layer holds a part of its experts.
    """
    count = layer.num_experts
    rows = torch.from_numpy(np.asarray(origin, dtype=np.int64)).to(layer.edges.device)
    new = rows < 0
    rows = rows.clamp(min=0)

    def taken(values: Tensor, fill: float = 0.0) -> Tensor:
        selected = values[rows]
        selected[new] = fill
        return selected

    if layer.storage is not None:
        layer.storage.renumber(origin)
    elif layer.held != list(range(count)):
        raise ValueError(f"expected layer {layer.layer_index} to hold all its experts, got {layer.held}")
    else:
        layer.hold(range(len(rows)), taken(layer.gate_up_proj.data), taken(layer.down_proj.data))
    layer.router.weight = _like(layer.router.weight, taken)
    layer.output_gain = _like(layer.output_gain, taken)
    for name in ("edge_gain", "edge_affinity"):
        setattr(
            layer, name, _like(getattr(layer, name), lambda values: taken(taken(values).T).T.contiguous())
        )
    layer.edges = torch.zeros(len(rows), len(rows), dtype=torch.bool, device=rows.device)
    layer.neurons = taken(layer.neurons, fill=-1)
    layer.resident, layer.residency_gate = None, None
    layer.attached, layer.ids = [], tuple(range(len(rows)))
    layer.num_visits = min(layer.num_visits, len(rows))


def saved_layers(model: FedGraftForCausalLM) -> SavedLayers:
    """References and copies of everything that ``write_plan`` changes, for ``restore_layers``.

    Weights of experts, which it replaces and does not overwrite, are not copied.
    """
    layers = []
    for layer in model.expert_layers():
        small = {name: getattr(layer, name).data.clone() for name in _SMALL}
        kept = {name: getattr(layer, name) for name in _KEPT}
        layers.append((layer.router.weight.data.clone(), small, kept))
    return SavedLayers({key: copy.deepcopy(getattr(model.config, key)) for key in _KEYS}, layers)


def restore_layers(model: FedGraftForCausalLM, saved: SavedLayers) -> None:
    """Undo ``write_plan`` on a model that holds all its experts in memory."""
    for layer, (router, small, kept) in zip(model.expert_layers(), saved.layers, strict=True):
        layer.router.weight = nn.Parameter(router, requires_grad=layer.router.weight.requires_grad)
        for name, value in small.items():
            old = getattr(layer, name)
            new = (
                nn.Parameter(value, requires_grad=old.requires_grad)
                if isinstance(old, nn.Parameter)
                else value
            )
            setattr(layer, name, new)
        for name, value in kept.items():
            setattr(layer, name, value)
    for key, value in saved.config.items():
        setattr(model.config, key, value)


def identity_origins(before: ExpertGraph, after: ExpertGraph) -> list[np.ndarray]:
    """Number in ``before`` of each expert of ``after``, per layer int64 ``[E']``; -1 for identities that it lacks."""
    return id_origins(before.ids_per_layer, after.ids_per_layer)


def id_origins(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Place in ``before[layer]`` of each identity of ``after[layer]``, int64; -1 for those that it lacks."""
    origins = []
    for known, ids in zip(before, after, strict=True):
        places = {identity: place for place, identity in enumerate(known)}
        origins.append(np.array([places.get(identity, -1) for identity in ids], dtype=np.int64))
    return origins


def _like(parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> nn.Parameter:
    return nn.Parameter(change(parameter.data), requires_grad=parameter.requires_grad)
