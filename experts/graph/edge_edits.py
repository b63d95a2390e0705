"""Edits of edges: their application to a graph, and the server's proposals by usage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from configs.errors import UserError
from experts.graph.edits import EDGE_EDITS, AddEdge, EdgeEdit, Edit, RemoveEdge
from experts.graph.expert_graph import ExpertGraph, reachable


def apply_edits(graph: ExpertGraph, edits: Sequence[Edit]) -> ExpertGraph:
    """Graph of the next version, after all ``edits`` in order; ``graph`` stays as it is.

    Raises:
        UserError: an edit of experts, an unknown layer or expert, a shared expert, an added edge that exists, a removed
            one that does not.
    """
    masks = [mask.copy() for mask in graph.masks]
    for edit in edits:
        if not isinstance(edit, AddEdge | RemoveEdge):
            raise UserError(f"expected an edit to be one of {', '.join(EDGE_EDITS)}, got {edit.op!r}")
        _check(edit, masks, graph.shared_per_layer)
        masks[edit.layer][edit.p, edit.q] = isinstance(edit, AddEdge)
    return replace(graph, masks=tuple(masks), version=graph.version + 1)


def propose_edits(
    graph: ExpertGraph, usage: Sequence[np.ndarray], rho_max: int, *, margin: float = 1.0
) -> list[EdgeEdit]:
    """Propose swaps of the least traveled edges for the most demanded ones, at most ``rho_max`` edits in all.

    A swap stays in its layer and needs a demand for the new edge above ``margin`` times the traversals of the old;
    swaps are chosen by gain. An odd ``rho_max`` leaves one more edit: the most demanded edge. No expert becomes
    unreachable. Edges of shared experts are neither added nor removed, since every token visits these anyway.

    Args:
        graph: current graph.
        usage: per layer ``[E, E]``, counts of ``federated.aggregation.usage.UsageCounter``.
        rho_max: largest number of edits.
        margin: factor between demand and traversals. Demand counts each of the ``k (k - 1) / 2`` pairs of a token's k
            experts, traversals at most ``k - 1`` parents: ``k / 2`` makes the two comparable.
    """
    swaps = [
        swap
        for layer, counts in enumerate(usage)
        for swap in _swaps(graph, counts, layer, rho_max // 2, margin)
    ]
    swaps.sort(key=lambda swap: -swap[0])
    edits = [edit for _, pair in swaps[: rho_max // 2] for edit in pair]
    if rho_max % 2:
        edits += _most_demanded(graph, usage, taken={(edit.layer, edit.p, edit.q) for edit in edits})
    return edits


def _check(edit: EdgeEdit, masks: Sequence[np.ndarray], num_shared: Sequence[int]) -> None:
    if edit.layer >= len(masks) or edit.q >= len(masks[edit.layer]):
        raise UserError(f"expected a known layer and experts p < q, got {edit}")
    if edit.p < num_shared[edit.layer]:
        raise UserError(
            f"expected an edge between experts that the router chooses, got {edit}; the first "
            f"{num_shared[edit.layer]} experts of layer {edit.layer} are shared, and every token visits them"
        )
    exists = bool(masks[edit.layer][edit.p, edit.q])
    if exists == isinstance(edit, AddEdge):
        state = "exists already" if exists else "does not exist"
        raise UserError(f"cannot {edit.op} {edit.p} -> {edit.q} in layer {edit.layer}: the edge {state}")


def _swaps(
    graph: ExpertGraph, counts: np.ndarray, layer: int, most: int, margin: float
) -> list[tuple[float, tuple[RemoveEdge, AddEdge]]]:
    """Gain and edits of the swaps of one layer, best first."""
    mask, num_shared = graph.masks[layer], graph.shared_per_layer[layer]
    missing = _by_count(~mask, counts, num_shared)[::-1][:most]
    removable = _removable(mask, counts, most, num_shared)
    swaps = []
    for (p, q), (a, b) in zip(missing, removable, strict=False):
        gain = float(counts[p, q] - margin * counts[a, b])
        if gain <= 0:
            break
        add = AddEdge(layer, p, q, f"demanded by {counts[p, q]:.0f} tokens")
        remove = RemoveEdge(layer, a, b, f"traveled by {counts[a, b]:.0f} tokens")
        swaps.append((gain, (remove, add)))
    return swaps


def _removable(mask: np.ndarray, counts: np.ndarray, most: int, num_shared: int) -> list[tuple[int, int]]:
    """Edges that may be removed together, least traveled first."""
    left = mask.copy()
    chosen: list[tuple[int, int]] = []
    for pair in _by_count(mask, counts, num_shared):
        if len(chosen) < most and _can_go(left, pair):
            left[pair] = False
            chosen.append(pair)
    return chosen


def _by_count(where: np.ndarray, counts: np.ndarray, num_shared: int) -> list[tuple[int, int]]:
    """Pairs p < q of the mask ``where`` without shared experts, ascending by count."""
    pairs = np.argwhere(np.triu(where, 1))
    pairs = pairs[pairs[:, 0] >= num_shared]
    order = np.argsort(counts[pairs[:, 0], pairs[:, 1]], kind="stable")
    return [(int(p), int(q)) for p, q in pairs[order]]


def _can_go(mask: np.ndarray, pair: tuple[int, int]) -> bool:
    """Whether all reachable experts stay reachable without this edge."""
    if mask[pair[1], pair[1]]:
        return True
    without = mask.copy()
    without[pair] = False
    return bool((reachable(without) == reachable(mask)).all())


def _most_demanded(graph: ExpertGraph, usage: Sequence[np.ndarray], taken: set) -> list[EdgeEdit]:
    best: tuple[float, EdgeEdit] | None = None
    for layer, (mask, counts, num_shared) in enumerate(
        zip(graph.masks, usage, graph.shared_per_layer, strict=True)
    ):
        for p, q in _by_count(~mask, counts, num_shared)[::-1]:
            if (layer, p, q) not in taken:
                if counts[p, q] > (best[0] if best else 0):
                    best = float(counts[p, q]), AddEdge(layer, p, q, f"demanded by {counts[p, q]:.0f} tokens")
                break
    return [best[1]] if best else []
