"""Edits of edges and roots: their application to a graph, and the server's proposals of edges by usage."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from configs.errors import UserError
from experts.graph.edits import AddEdge, CloseRoot, EdgeEdit, Edit, OpenRoot, RemoveEdge, RootEdit
from experts.graph.expert_graph import ExpertGraph, check_reachable, reachable


def apply_edits(graph: ExpertGraph, edits: Sequence[Edit]) -> ExpertGraph:
    """Graph of the next version, after all ``edits`` in order; ``graph`` stays as it is.

    Raises:
        UserError: an edit of experts, an unknown layer or expert, a shared or attached expert, an added edge or root
            that exists, a removed one that does not, or one without which an expert of ``graph`` that could be
            reached no longer can.
    """
    masks = [mask.copy() for mask in graph.masks]
    before = {edit.layer: reachable(masks[edit.layer]) for edit in edits if edit.layer < len(masks)}
    for edit in edits:
        if isinstance(edit, AddEdge | RemoveEdge):
            _check_edge(edit, graph, masks)
            entry = edit.p, edit.q
        elif isinstance(edit, OpenRoot | CloseRoot):
            _check_root(edit, graph, masks)
            entry = edit.expert, edit.expert
        else:
            known = (AddEdge, RemoveEdge, OpenRoot, CloseRoot)
            raise UserError(
                f"expected an edit to be one of {', '.join(kind.op for kind in known)}, got {edit.op!r}"
            )
        mask = masks[edit.layer]
        mask[entry] = isinstance(edit, AddEdge | OpenRoot)
        check_reachable(mask, edit.layer, before=before[edit.layer])
    return replace(graph, masks=tuple(masks), version=graph.version + 1)


def propose_edits(
    graph: ExpertGraph,
    usage: Sequence[np.ndarray],
    rho_max: int,
    *,
    margin: float = 1.0,
    resting: Collection[tuple[int, int, int]] = (),
) -> list[EdgeEdit]:
    """Propose swaps of the least traveled edges for the most demanded ones, at most ``rho_max`` edits in all.

    A swap stays in its layer and needs a demand for the new edge above ``margin`` times the traversals of the old;
    swaps are chosen by gain. An odd ``rho_max`` leaves one more edit: the most demanded edge. No expert becomes
    unreachable. Edges of shared and attached experts are neither added nor removed: these are visited in any case.

    Args:
        graph: current graph.
        usage: per layer ``[E, E]``, counts of ``federated.aggregation.usage.UsageCounter``.
        rho_max: largest number of edits.
        margin: factor between demand and traversals. Demand counts each of the ``k (k - 1) / 2`` pairs of a token's k
            experts, traversals at most ``k - 1`` parents: ``k / 2`` makes the two comparable.
        resting: ``(layer, p, q)`` of edges that are neither added nor removed, since they were edited lately.
    """
    editable = [_editable(graph, layer, resting) for layer in range(len(graph.masks))]
    swaps = [
        swap
        for layer, counts in enumerate(usage)
        for swap in _swaps(graph.masks[layer], editable[layer], counts, layer, rho_max // 2, margin)
    ]
    swaps.sort(key=lambda swap: -swap[0])
    edits = [edit for _, pair in swaps[: rho_max // 2] for edit in pair]
    if rho_max % 2:
        edits += _most_demanded(
            graph, editable, usage, taken={(edit.layer, edit.p, edit.q) for edit in edits}
        )
    return edits


def _check_edge(edit: EdgeEdit, graph: ExpertGraph, masks: Sequence[np.ndarray]) -> None:
    if edit.layer >= len(masks) or edit.q >= len(masks[edit.layer]):
        raise UserError(f"expected a known layer and experts p < q, got {edit}")
    for expert in (edit.p, edit.q):
        _check_chosen(edit, expert, graph)
    exists = bool(masks[edit.layer][edit.p, edit.q])
    if exists == isinstance(edit, AddEdge):
        state = "exists already" if exists else "does not exist"
        raise UserError(f"cannot {edit.op} {edit.p} -> {edit.q} in layer {edit.layer}: the edge {state}")


def _check_root(edit: RootEdit, graph: ExpertGraph, masks: Sequence[np.ndarray]) -> None:
    if edit.layer >= len(masks) or edit.expert >= len(masks[edit.layer]):
        raise UserError(f"expected a known layer and a known expert, got {edit}")
    _check_chosen(edit, edit.expert, graph)
    if bool(masks[edit.layer][edit.expert, edit.expert]) == isinstance(edit, OpenRoot):
        state = "open already" if isinstance(edit, OpenRoot) else "closed already"
        raise UserError(f"cannot {edit.op} of expert {edit.expert} in layer {edit.layer}: it is {state}")


def _check_chosen(edit: EdgeEdit | RootEdit, expert: int, graph: ExpertGraph) -> None:
    """Refuse a shared or attached expert, which the router does not choose."""
    shared, attached = graph.shared_per_layer[edit.layer], graph.attached_per_layer[edit.layer]
    if expert < shared:
        raise UserError(
            f"expected an edit of experts that the router chooses, got {edit}; the first {shared} experts of layer "
            f"{edit.layer} are shared, and every token visits them"
        )
    if expert in attached:
        raise UserError(
            f"expected an edit of experts that the router chooses, got {edit}; expert {expert} is attached"
        )


def _swaps(
    mask: np.ndarray, editable: np.ndarray, counts: np.ndarray, layer: int, most: int, margin: float
) -> list[tuple[float, tuple[RemoveEdge, AddEdge]]]:
    """Gain and edits of the swaps of one layer, best first."""
    missing = _by_count(~mask & editable, counts)[::-1][:most]
    removable = _removable(mask, editable, counts, most)
    swaps = []
    for (p, q), (a, b) in zip(missing, removable, strict=False):
        gain = float(counts[p, q] - margin * counts[a, b])
        if gain <= 0:
            break
        add = AddEdge(layer, p, q, f"demanded by {counts[p, q]:.0f} tokens")
        remove = RemoveEdge(layer, a, b, f"traveled by {counts[a, b]:.0f} tokens")
        swaps.append((gain, (remove, add)))
    return swaps


def _editable(graph: ExpertGraph, layer: int, resting: Collection[tuple[int, int, int]]) -> np.ndarray:
    """Pairs p < q of experts that the router chooses, neither shared nor attached, and not resting, bool ``[E, E]``."""
    chosen = np.arange(graph.num_experts[layer]) >= graph.shared_per_layer[layer]
    chosen[list(graph.attached_per_layer[layer])] = False
    pairs = np.triu(np.outer(chosen, chosen), 1)
    for at, p, q in resting:
        if at == layer:
            pairs[p, q] = False
    return pairs


def _removable(
    mask: np.ndarray, editable: np.ndarray, counts: np.ndarray, most: int
) -> list[tuple[int, int]]:
    """Edges that may be removed together, least traveled first."""
    left = mask.copy()
    chosen: list[tuple[int, int]] = []
    for pair in _by_count(mask & editable, counts):
        if len(chosen) < most and _can_go(left, pair):
            left[pair] = False
            chosen.append(pair)
    return chosen


def _by_count(where: np.ndarray, counts: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of the mask ``where``, ascending by count."""
    pairs = np.argwhere(where)
    order = np.argsort(counts[pairs[:, 0], pairs[:, 1]], kind="stable")
    return [(int(p), int(q)) for p, q in pairs[order]]


def _can_go(mask: np.ndarray, pair: tuple[int, int]) -> bool:
    """Whether all reachable experts stay reachable without this edge."""
    if mask[pair[1], pair[1]]:
        return True
    without = mask.copy()
    without[pair] = False
    return bool((reachable(without) == reachable(mask)).all())


def _most_demanded(
    graph: ExpertGraph, editable: Sequence[np.ndarray], usage: Sequence[np.ndarray], taken: set
) -> list[EdgeEdit]:
    best: tuple[float, EdgeEdit] | None = None
    for layer, (mask, counts) in enumerate(zip(graph.masks, usage, strict=True)):
        for p, q in _by_count(~mask & editable[layer], counts)[::-1]:
            if (layer, p, q) not in taken:
                if counts[p, q] > (best[0] if best else 0):
                    best = float(counts[p, q]), AddEdge(layer, p, q, f"demanded by {counts[p, q]:.0f} tokens")
                break
    return [best[1]] if best else []
