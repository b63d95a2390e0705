"""The expert graph as plain data: one upper-triangular boolean mask per layer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import networkx
import numpy as np

from configs.errors import UserError


@dataclass(frozen=True)
class ExpertGraph:
    """Who may be entered from the router, and who passes information to whom.

    Attributes:
        masks: per layer, bool ``[E, E]``, upper-triangular: ``mask[e, e]`` marks a root, ``mask[p, q]`` an edge p -> q.
        version: server merges applied since the bootstrap.
    """

    masks: tuple[np.ndarray, ...]
    version: int = 0

    def __post_init__(self):
        for layer, mask in enumerate(self.masks):
            check_mask(mask, layer)

    @property
    def num_experts(self) -> list[int]:
        """Experts per layer."""
        return [len(mask) for mask in self.masks]

    def edges_per_layer(self) -> list[int]:
        """Edges per layer; roots do not count."""
        return [int(np.triu(mask, 1).sum()) for mask in self.masks]

    def digest(self) -> str:
        """SHA-256 over version, shapes and bits: equal on two sides exactly when their graphs are."""
        state = hashlib.sha256(str(self.version).encode())
        for mask in self.masks:
            state.update(len(mask).to_bytes(4, "little"))
            state.update(np.packbits(mask).tobytes())
        return state.hexdigest()

    def restrict(self, residents: Sequence[np.ndarray]) -> ExpertGraph:
        """The graph of a client that holds ``residents`` (per layer, bool ``[E]``): ``M & outer(r, r)``."""
        masks = [mask & np.outer(held, held) for mask, held in zip(self.masks, residents, strict=True)]
        return ExpertGraph(tuple(masks), self.version)


def check_mask(mask: np.ndarray, layer: int) -> None:
    """Refuse a mask that is not a boolean, upper-triangular square.

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


def reachable(mask: np.ndarray) -> np.ndarray:
    """Experts ``[E]`` that a walk can visit: roots and everything along edges from them."""
    graph = networkx.from_numpy_array(np.triu(mask, 1), create_using=networkx.DiGraph)
    found = np.zeros(len(mask), dtype=bool)
    for root in np.flatnonzero(np.diagonal(mask)):
        found[[root, *networkx.descendants(graph, root)]] = True
    return found


def check_reachable(mask: np.ndarray, layer: int) -> None:
    """Refuse a graph with an expert that no walk can visit.

    Raises:
        UserError: names the layer and the experts.
    """
    lost = np.flatnonzero(~reachable(mask)).tolist()
    if lost:
        raise UserError(
            f"layer {layer}: expected every expert within reach of a root, got none for {', '.join(map(str, lost))}; "
            "open its root or draw an edge to it"
        )


def edges_by_lift(selected: np.ndarray, edges_per_expert: int) -> np.ndarray:
    """Edges between experts that tokens select together more often than chance.

    Args:
        selected: bool ``[T, E]``, the experts that each token of the calibration text selected.
        edges_per_expert: edges that leave an expert at most.

    Returns:
        bool ``[E, E]``: all roots open, and from each expert its strongest later partners by co-selection lift
        ``P(p, q) / (P(p) P(q))``, as long as the lift exceeds that of experts drawn without regard to each other.
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
    """Mean lift of k experts drawn at random out of E: below one, since each pick leaves fewer to pick from."""
    experts, picks = chosen.shape[1], chosen.sum(axis=1).mean() if len(chosen) else 0.0
    if experts < 2 or picks <= 1:
        return 1.0
    return float((picks - 1) * experts / ((experts - 1) * picks))
