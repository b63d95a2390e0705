"""Candidates for the next removal: the least salient expert, and the most similar pair of a layer.

Shape suffixes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experts.selection.compression_trace import Removal


class RemovalCandidates:
    """State of a greedy removal: experts left, exemptions, group sizes, rejected pairs. Numbers never change.

    Args:
        ranks_LE: saliency ranks among all experts of the model, 1 the best, NaN where absent.
        free_LE: bool, experts that may be removed.
        routed_LE: bool, all but the shared experts, which are neither removed nor merged into.
        min_experts_per_layer: smallest number of routed experts that a layer keeps.
        max_group_size: largest number of experts merged into one.

    Attributes:
        left_LE: bool, experts left.
    """

    def __init__(
        self,
        ranks_LE: np.ndarray,
        free_LE: np.ndarray,
        routed_LE: np.ndarray,
        *,
        min_experts_per_layer: int,
        max_group_size: int,
    ) -> None:
        self.left_LE, self._routed_LE = ~np.isnan(ranks_LE), routed_LE
        self._free_LE, self._least, self._largest = free_LE, min_experts_per_layer, max_group_size
        self._group_LE = self.left_LE.astype(np.int64)
        self._refused: dict[Removal, float] = {}
        # Ties are resolved by the higher expert number, then by the later layer.
        layers, experts = np.indices(ranks_LE.shape)
        order = np.lexsort((-layers.ravel(), -experts.ravel(), -ranks_LE.ravel()))
        turns = np.empty(ranks_LE.size, dtype=np.int64)
        turns[order] = np.arange(ranks_LE.size)
        self._turn_LE = turns.reshape(ranks_LE.shape)

    def to_prune(self) -> Removal | None:
        """Pruning of the least salient removable expert; None without one."""
        free = np.argwhere(self._open_LE)
        if not len(free):
            return None
        layer, expert = min(free.tolist(), key=lambda pair: self._turn_LE[tuple(pair)])
        return Removal(layer, expert)

    def to_merge(self, likeness: Sequence[np.ndarray], last_loss: float = -np.inf) -> Removal | None:
        """Merge of a pair of a layer, the less salient into the other; None without one.

        The most similar pair that was not rejected. The rejected pair of smallest loss is offered again where that loss
        is below ``last_loss`` or no other pair is left.

        Args:
            likeness: similarity per layer, ``[E, E]``.
            last_loss: perplexity loss of the step before.
        """
        allowed = [self._allowed_EE(layer, len(values)) for layer, values in enumerate(likeness)]
        refused = {
            pair: loss for pair, loss in self._refused.items() if allowed[pair.layer][pair.expert, pair.into]
        }
        for pair in refused:
            allowed[pair.layer][pair.expert, pair.into] = False
        known = min(refused, key=refused.__getitem__, default=None)
        if known is not None and refused[known] < last_loss:
            return known
        return _most_alike(likeness, allowed) or known

    def refuse(self, removal: Removal, loss: float) -> None:
        """Record a rejected removal with its measured loss."""
        if removal.into is not None:
            self._refused[removal] = np.inf if np.isnan(loss) else loss

    def take(self, removal: Removal) -> None:
        """Record an executed removal, and the growth of the group that it is merged into."""
        place = removal.layer, removal.expert
        self.left_LE[place] = False
        if removal.into is not None:
            self._group_LE[removal.layer, removal.into] += self._group_LE[place]
            # Drop cached losses involving the merged expert: its weights changed.
            self._refused = {
                pair: loss
                for pair, loss in self._refused.items()
                if pair.layer != removal.layer or removal.into not in (pair.expert, pair.into)
            }

    @property
    def _open_LE(self) -> np.ndarray:
        room_L = (self.left_LE & self._routed_LE).sum(axis=1) > self._least
        return self.left_LE & self._free_LE & room_L[:, None]

    def _allowed_EE(self, layer: int, number: int) -> np.ndarray:
        """Allowed merges, bool ``[E, E]``: expert of the row into that of the column."""
        turn_E, group_E = self._turn_LE[layer, :number], self._group_LE[layer, :number]
        target_E = (self.left_LE & self._routed_LE)[layer, :number]
        allowed_EE = self._open_LE[layer, :number, None] & target_E
        return allowed_EE & (turn_E[:, None] < turn_E) & (group_E[:, None] + group_E <= self._largest)


def _most_alike(likeness: Sequence[np.ndarray], allowed: Sequence[np.ndarray]) -> Removal | None:
    best, found = -np.inf, None
    for layer, (values_EE, allowed_EE) in enumerate(zip(likeness, allowed, strict=True)):
        values_EE = np.where(allowed_EE, values_EE, -np.inf)
        gone, into = divmod(int(values_EE.argmax()), len(values_EE))
        if values_EE[gone, into] > best:
            best, found = values_EE[gone, into], Removal(layer, gone, into)
    return found
