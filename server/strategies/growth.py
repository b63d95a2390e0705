"""Proposals of spawned and retired experts: growth where the clients' text has changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from experts.graph.edit_plan import spawned_last
from experts.graph.edits import RetireExpert, SpawnExpert
from experts.graph.expert_graph import ExpertGraph


def expert_loads(graph: ExpertGraph, usage: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Visits of each expert, per layer ``[E]``: entries from the router and traversals of edges, without demand.

    Args:
        graph: graph that the counts belong to.
        usage: per layer ``[E, E]``, see ``federated.aggregation.usage``.
    """
    return [
        (counts * (mask | np.eye(len(mask), dtype=bool))).sum(0)
        for mask, counts in zip(graph.masks, usage, strict=True)
    ]


def attached_visits(graph: ExpertGraph, usage: Sequence[np.ndarray]) -> list[dict[str, float]]:
    """Visits of each attached expert over the mean of its layer's experts, shared ones apart, with layer and identity.

    Args:
        graph: graph that the counts belong to.
        usage: per layer ``[E, E]``; empty: none is known.
    """
    return [
        {
            "layer": layer,
            "id": graph.ids_per_layer[layer][expert],
            "visits_over_mean": load / mean if mean else 0.0,
        }
        for layer, expert, load, mean in (_attached_loads(graph, usage) if usage else ())
    ]


def propose_spawns(
    graph: ExpertGraph,
    usage: Sequence[np.ndarray],
    divergence: Sequence[float],
    *,
    most: int,
    max_spawned: int,
) -> list[SpawnExpert]:
    """Propose one new expert for each of the layers whose routing moved most, beside its most visited expert.

    The parent is chosen by the router and has no attached expert yet.

    Args:
        graph: current graph.
        usage: moving average of usage.
        divergence: divergence of routing of each layer; empty: layers are taken in order.
        most: largest number of proposals.
        max_spawned: attached experts of a layer from which it grows no further.
    """
    edits: list[SpawnExpert] = []
    loads = expert_loads(graph, usage)
    moved = np.asarray(divergence) if len(divergence) == len(loads) else np.zeros(len(loads))
    for layer in np.argsort(-moved, kind="stable").tolist():
        attached = graph.attached_per_layer[layer]
        free = _free_parents(graph, layer)
        if len(edits) == most or len(attached) >= max_spawned or not free.any():
            continue
        parent = int(np.where(free, loads[layer], -1).argmax())
        if loads[layer][parent] > 0:
            share = loads[layer][parent] / loads[layer].sum()
            reason = f"drift; {share:.1%} of the layer's visits, routing moved by {moved[layer]:.3f} bits"
            edits.append(SpawnExpert(layer, parent, graph.num_experts[layer], reason))
    return edits


def propose_retirements(
    graph: ExpertGraph, usage: Sequence[np.ndarray], *, most: int, retire_below: float
) -> list[RetireExpert]:
    """Propose to retire the attached experts whose visits are below a share of the mean over their layer's experts.

    Experts of the dense base are not retired: what no client visits today may be what one needs tomorrow. Neither are
    experts of the latest plan, which had no round to be visited in.

    Args:
        graph: current graph.
        usage: moving average of usage.
        most: largest number of proposals.
        retire_below: share of the mean; 0: none is retired.
    """
    found = []
    for layer, expert, load, mean in _attached_loads(graph, usage):
        if load < retire_below * mean and not spawned_last(graph, layer, expert):
            reason = f"visited by {load:.0f} tokens, {load / mean:.2%} of the layer's mean"
            found.append((load / mean, RetireExpert(layer, expert, reason)))
    return [edit for _, edit in sorted(found, key=lambda each: each[0])[:most]]


def _attached_loads(
    graph: ExpertGraph, usage: Sequence[np.ndarray]
) -> Iterator[tuple[int, int, float, float]]:
    """Layer and number of each attached expert, its visits, and the mean of its layer's experts, shared ones apart."""
    for layer, load in enumerate(expert_loads(graph, usage)):
        mean = float(load[graph.shared_per_layer[layer] :].mean())
        for expert in graph.attached_per_layer[layer]:
            yield layer, expert, float(load[expert]), mean


def _free_parents(graph: ExpertGraph, layer: int) -> np.ndarray:
    """Experts that the router chooses and that have no attached expert, bool ``[E]``."""
    attached = list(graph.attached_per_layer[layer])
    free: np.ndarray = np.logical_not(graph.masks[layer][:, attached].any(axis=1))
    free[attached] = False
    free[: graph.shared_per_layer[layer]] = False
    return free
