"""Expert graph as plain data: one upper-triangular boolean mask per layer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from configs.errors import UserError


@dataclass(frozen=True)
class ExpertGraph:
    """Roots, which the router may choose, and edges, along which outputs pass, of every layer.

    Attributes:
        masks: per layer, bool ``[E, E]``, upper-triangular: ``mask[e, e]`` marks a root, ``mask[p, q]`` an edge p -> q.
        version: number of server merges since the bootstrap.
        num_shared: shared experts per layer, the first of the layer, which every token visits and no edit changes;
            empty for none in any layer.
        attached: attached experts per layer, ascending: never chosen by the walk, but visited in addition to its k
            wherever an expert with an edge to them is; empty for none in any layer.
        ids: per layer, an identity of each expert that no edit changes and no later expert takes, so that what is
            stored per expert is found again after a renumbering; empty: the numbers themselves.
    """

    masks: tuple[np.ndarray, ...]
    version: int = 0
    num_shared: tuple[int, ...] = ()
    attached: tuple[tuple[int, ...], ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        for layer, mask in enumerate(self.masks):
            check_mask(mask, layer)
        lists = {"number of shared experts": self.num_shared, "list of attached experts": self.attached}
        for what, found in (lists | {"list of identities": self.ids}).items():
            if found and len(found) != len(self.masks):
                raise UserError(f"expected one {what} for each of {len(self.masks)} layers, got {len(found)}")
        for layer, (mask, attached) in enumerate(zip(self.masks, self.attached_per_layer, strict=True)):
            check_attached(mask, attached, layer)

    @property
    def num_experts(self) -> list[int]:
        """Number of experts per layer."""
        return [len(mask) for mask in self.masks]

    @property
    def shared_per_layer(self) -> list[int]:
        """Number of shared experts per layer."""
        return list(self.num_shared) or [0] * len(self.masks)

    @property
    def attached_per_layer(self) -> list[tuple[int, ...]]:
        """Attached experts per layer."""
        return list(self.attached) or [()] * len(self.masks)

    @property
    def ids_per_layer(self) -> list[tuple[int, ...]]:
        """Identities of the experts per layer."""
        return list(self.ids) or [tuple(range(count)) for count in self.num_experts]

    def edges_per_layer(self) -> list[int]:
        """Number of edges per layer, without roots."""
        return [int(np.triu(mask, 1).sum()) for mask in self.masks]

    def digest(self) -> str:
        """SHA-256 of all attributes: equal on two sides where their graphs are equal."""
        state = hashlib.sha256(str(self.version).encode())
        for mask in self.masks:
            state.update(len(mask).to_bytes(4, "little"))
            state.update(np.packbits(mask).tobytes())
        if any(self.num_shared):
            state.update(str(self.num_shared).encode())
        if any(self.attached):
            state.update(f"attached {self.attached_per_layer}".encode())
        if self.ids_per_layer != [tuple(range(count)) for count in self.num_experts]:
            state.update(f"ids {self.ids_per_layer}".encode())
        return state.hexdigest()

    def restrict(self, residents: Sequence[np.ndarray]) -> ExpertGraph:
        """The graph of a client that holds ``residents`` (per layer, bool ``[E]``): ``M & outer(r, r)``."""
        masks = [mask & np.outer(held, held) for mask, held in zip(self.masks, residents, strict=True)]
        attached = [
            tuple(expert for expert in experts if mask[:, expert].any())
            for mask, experts in zip(masks, self.attached_per_layer, strict=True)
        ]
        return replace(self, masks=tuple(masks), attached=tuple(attached))


def check_mask(mask: np.ndarray, layer: int) -> None:
    """Refuse a mask that is not boolean, square and upper-triangular.

    Raises:
        UserError: names the layer and the first offending entry.
    """
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or mask.dtype != np.bool_:
        raise UserError(
            f"layer {layer}: expected a square boolean mask, got shape {mask.shape} of {mask.dtype}; "
            "store one bool per pair of experts"
        )
    below = np.argwhere(np.tril(mask, -1))
    if len(below):
        p, q = below[0]
        raise UserError(
            f"layer {layer}: expected an upper-triangular mask, got an edge {p} -> {q}; edges must run from a lower "
            "to a higher expert, so renumber the experts or drop the edge"
        )


def check_attached(mask: np.ndarray, attached: Sequence[int], layer: int) -> None:
    """Refuse attached experts with a root, without an edge to them, or with an edge from them.

    Raises:
        UserError: names the layer and the expert.
    """
    for expert in attached:
        if not 0 <= expert < len(mask) or mask[expert].any() or not mask[:expert, expert].any():
            raise UserError(
                f"layer {layer}: expected an attached expert to have edges to it, no root and no edge from it, got "
                f"expert {expert} of {len(mask)}"
            )


def reachable(mask: np.ndarray) -> np.ndarray:
    """Reachable experts, bool ``[E]``: roots and their descendants along edges."""
    found = np.diagonal(mask).copy()
    while True:
        wider = found | mask[found].any(axis=0)
        if (wider == found).all():
            return found
        found = wider


def check_reachable(mask: np.ndarray, layer: int, *, before: np.ndarray | None = None) -> None:
    """Refuse a graph with an unreachable expert.

    Args:
        mask: bool ``[E, E]``.
        layer: index, for the message.
        before: bool ``[E]``, the experts that must be reachable, those before an edit; None: all.

    Raises:
        UserError: names the layer and the experts.
    """
    unreached = ~reachable(mask)
    lost = np.flatnonzero(unreached if before is None else unreached & before).tolist()
    if lost:
        raise UserError(
            f"layer {layer}: expected every expert within reach of a root, got none for {', '.join(map(str, lost))}; "
            "open its root or draw an edge to it"
        )


def edges_by_lift(selected: np.ndarray, edges_per_expert: int) -> np.ndarray:
    """Edges between experts that tokens select together more often than chance (co-selection lift above 1).

    Args:
        selected: bool ``[T, E]``, top-k experts of each token of the calibration text.
        edges_per_expert: largest number of edges that leave an expert.

    Returns:
        bool ``[E, E]``: all roots, and from each expert edges to the later experts of highest co-selection lift
        ``P(p, q) / (P(p) P(q))``, where the lift exceeds that of independently drawn experts.
    """
    chosen = selected.astype(np.float64)
    together = chosen.T @ chosen / max(len(chosen), 1)
    alone = np.diagonal(together)
    lift = together / np.maximum(np.outer(alone, alone), 1e-12) / _chance_lift(chosen)
    mask = np.eye(selected.shape[1], dtype=bool)
    for p in range(len(mask)):
        later = np.arange(p + 1, len(mask))
        best = later[np.argsort(-lift[p, later], kind="stable")[:edges_per_expert]]
        mask[p, best[lift[p, best] > 1]] = True
    return mask


def _chance_lift(chosen: np.ndarray) -> float:
    """Mean lift of k experts drawn at random without replacement out of E; below one."""
    experts, picks = chosen.shape[1], chosen.sum(axis=1).mean() if len(chosen) else 0.0
    if experts < 2 or picks <= 1:
        return 1.0
    return float((picks - 1) * experts / ((experts - 1) * picks))
