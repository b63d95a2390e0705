"""Removal of experts from a graph: retired, or merged into others; the remaining experts are renumbered."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from configs.errors import UserError
from experts.graph.edits import Edit, MergeExperts, RetireExpert
from experts.graph.expert_graph import ExpertGraph, reachable


@dataclass(frozen=True, eq=False)
class EditedGraph:
    """Graph with fewer experts, and the map from old to new numbers.

    Attributes:
        graph: graph of the next version; every expert is reachable from a root.
        kept: per layer, the old numbers of the remaining experts, ascending: entry n is the old number of n.
        numbers: per layer, old number to new; a merged expert maps to its target's, a retired one is missing.
        added: per layer, bool ``[E', E']``: new edges. Nothing was learned for them, so that their gains and
            affinities start at zero.
    """

    graph: ExpertGraph
    kept: tuple[np.ndarray, ...]
    numbers: tuple[dict[int, int], ...]
    added: tuple[np.ndarray, ...]


class EditedLayer(NamedTuple):
    """One layer of an ``EditedGraph``: its mask, and the entries of ``kept``, ``numbers`` and ``added``."""

    mask: np.ndarray
    kept: np.ndarray
    numbers: dict[int, int]
    added: np.ndarray


def retirements(
    keep_map: Mapping[int, np.ndarray], experts_per_layer: Sequence[int], reason: str = ""
) -> list[RetireExpert]:
    """Retirements that leave each layer the experts of ``keep_map``; an unnamed layer keeps all."""
    return [
        RetireExpert(layer, expert, reason)
        for layer, kept in sorted(keep_map.items())
        for expert in np.setdiff1d(np.arange(experts_per_layer[layer]), kept).tolist()
    ]


def apply_expert_edits(graph: ExpertGraph, edits: Sequence[Edit]) -> EditedGraph:
    """Apply removals of experts to a graph, all at once; ``graph`` stays unchanged.

    ``RetireExpert``: the expert's parents get edges to its children, also through several retired experts in a row.
    ``MergeExperts``: the target takes over edges and root of the removed expert, as far as edges run from the lower to
    the higher expert; other edges are dropped. An expert that becomes unreachable becomes a root. Shared experts are
    neither removed nor merged into, and get no edges.

    Args:
        graph: graph before the edits.
        edits: edits in the numbers of ``graph``; their order does not matter.

    Raises:
        UserError: an edit of edges, an unknown layer or expert, an expert removed twice or merged into a removed one, a
            layer without experts, a shared expert.
    """
    removed: list[dict[int, int | None]] = [{} for _ in graph.masks]  # removed expert -> target of its merge
    for edit in edits:
        if not isinstance(edit, RetireExpert | MergeExperts):
            raise UserError(
                f"expected an edit to be one of {RetireExpert.op}, {MergeExperts.op}, got {edit.op!r}"
            )
        into = edit.into if isinstance(edit, MergeExperts) else None
        if edit.layer >= len(removed) or max(edit.expert, into or 0) >= graph.num_experts[edit.layer]:
            raise UserError(f"expected a known layer and known experts, got {edit}")
        if edit.expert in removed[edit.layer]:
            raise UserError(f"expected expert {edit.layer}:{edit.expert} to be taken out once, got it twice")
        removed[edit.layer][edit.expert] = into
    layers = [
        remove_from_mask(mask, removed[layer], layer, graph.shared_per_layer[layer])
        for layer, mask in enumerate(graph.masks)
    ]
    masks, kept, numbers, added = zip(*layers, strict=True) if layers else ((), (), (), ())
    attached = [
        still_attached(layer.mask, layer.kept, before)
        for layer, before in zip(layers, graph.attached_per_layer, strict=True)
    ]
    ids = [
        tuple(each[old] for old in layer.kept)
        for layer, each in zip(layers, graph.ids_per_layer, strict=True)
    ]
    edited = replace(
        graph,
        masks=masks,
        version=graph.version + 1,
        attached=tuple(attached) if any(attached) else (),
        ids=tuple(ids),
    )
    return EditedGraph(edited, kept, numbers, added)


def unchanged(graph: ExpertGraph) -> EditedGraph:
    """A graph without any edit, of the same version."""
    kept = tuple(np.arange(count) for count in graph.num_experts)
    numbers = tuple({expert: expert for expert in range(count)} for count in graph.num_experts)
    return EditedGraph(graph, kept, numbers, tuple(np.zeros_like(mask) for mask in graph.masks))


def still_attached(mask: np.ndarray, kept: np.ndarray, attached: Collection[int]) -> tuple[int, ...]:
    """New numbers of the attached experts that an edge still leads to; one without any is a root.

    Args:
        mask: bool ``[E', E']`` after the removals.
        kept: old numbers of the remaining experts ``[E']``.
        attached: old numbers of the attached experts.
    """
    return tuple(new for new, old in enumerate(kept) if old in attached and not mask[new, new])


def remove_from_mask(
    mask: np.ndarray, removed: Mapping[int, int | None], layer: int, num_shared: int = 0
) -> EditedLayer:
    """Remove experts from one layer, as ``apply_expert_edits`` does.

    Args:
        mask: bool ``[E, E]``.
        removed: by removed expert, the expert that it is merged into, or None.
        layer: index, for messages.
        num_shared: shared experts, the first of the layer.

    Raises:
        UserError: no expert would stay, one is merged into an expert that is removed itself, or a shared one is removed
            or merged into.
    """
    _check_shared(removed, layer, num_shared)
    kept = np.array([expert for expert in range(len(mask)) if expert not in removed], dtype=np.int64)
    if not len(kept):
        raise UserError(f"expected an expert to stay in layer {layer}, got all of them taken out")
    into = np.arange(len(mask))
    for gone, target in removed.items():
        if target in removed:
            raise UserError(f"expected experts of layer {layer} to merge into one that stays, got {target}")
        into[gone] = gone if target is None else target
    rewired = _move(_bridge(mask, [gone for gone, target in removed.items() if target is None]), into)
    rewired[:num_shared] = mask[:num_shared]
    after = rewired[np.ix_(kept, kept)]
    _open_roots(after)
    number = {int(old): new for new, old in enumerate(kept)}
    numbers = {old: number[int(new)] for old, new in enumerate(into) if int(new) in number}
    return EditedLayer(after, kept, numbers, np.triu(after & ~mask[np.ix_(kept, kept)], 1))


def _check_shared(removed: Mapping[int, int | None], layer: int, num_shared: int) -> None:
    for gone, target in removed.items():
        if named := [expert for expert in (gone, target) if expert is not None and expert < num_shared]:
            raise UserError(
                f"expected experts that the router chooses to be removed or merged in layer {layer}, got "
                f"{named[0]}, one of its {num_shared} shared experts, which every token visits"
            )


def _bridge(mask: np.ndarray, retired: Sequence[int]) -> np.ndarray:
    """Mask with edges from the parents of every retired expert to its children."""
    mask = mask.copy()
    for expert in sorted(retired):
        mask[:expert, expert + 1 :] |= np.outer(mask[:expert, expert], mask[expert, expert + 1 :])
    return mask


def _move(mask: np.ndarray, into: np.ndarray) -> np.ndarray:
    """Mask with edges and roots moved from each expert to ``into[expert]``; edges that would run down are dropped."""
    moved = np.zeros_like(mask)
    for p, q in np.argwhere(mask):
        if p == q or into[p] < into[q]:
            moved[into[p], into[q]] = True
    return moved


def _open_roots(mask: np.ndarray) -> None:
    """Open the roots of unreachable experts, the lowest first, since edges lead on from it; in place."""
    while len(lost := np.flatnonzero(~reachable(mask))):
        mask[lost[0], lost[0]] = True
