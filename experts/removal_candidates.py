"""Which expert may go next: the least salient of the model, or the less salient of the most alike pair.

Shape suffixes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experts.compression_plan import Removal


class RemovalCandidates:
    """The experts that are left, and the rules that hold them. Numbers never change.

    Args:
        ranks_LE: by saliency among all experts of the model, 1 the best, NaN where absent.
        free_LE: bool, experts that may go.
        min_experts_per_layer: that stay.
        max_group_size: experts that become one, at most.

    Attributes:
        left_LE: bool, experts that are there.
    """

    def __init__(
        self, ranks_LE: np.ndarray, free_LE: np.ndarray, *, min_experts_per_layer: int, max_group_size: int
    ) -> None:
        self.left_LE = ~np.isnan(ranks_LE)
        self._free_LE, self._least, self._largest = free_LE, min_experts_per_layer, max_group_size
        self._group_LE = self.left_LE.astype(np.int64)
        # Of equal experts the one with the higher number goes first, and of those the one in the later layer.
        layers, experts = np.indices(ranks_LE.shape)
        order = np.lexsort((-layers.ravel(), -experts.ravel(), -ranks_LE.ravel()))
        turns = np.empty(ranks_LE.size, dtype=np.int64)
        turns[order] = np.arange(ranks_LE.size)
        self._turn_LE = turns.reshape(ranks_LE.shape)

    def to_prune(self) -> Removal | None:
        """The least salient expert that may go; None where none may."""
        free = np.argwhere(self._open_LE)
        if not len(free):
            return None
        layer, expert = min(free.tolist(), key=lambda pair: self._turn_LE[tuple(pair)])
        return Removal(layer, expert)

    def to_merge(self, likeness: Sequence[np.ndarray]) -> Removal | None:
        """The most alike pair of a layer, the less salient going into the other; None where none may.

        Args:
            likeness: per layer ``[E, E]``.
        """
        pairs = [self._best_pair(layer, values) for layer, values in enumerate(likeness)]
        best = max((pair for pair in pairs if pair is not None), key=lambda pair: pair[0], default=None)
        return None if best is None else best[1]

    def take(self, removal: Removal) -> None:
        """The removal is made: its expert is there no longer, and the group that it is merged into grows."""
        place = removal.layer, removal.expert
        self.left_LE[place] = False
        if removal.into is not None:
            self._group_LE[removal.layer, removal.into] += self._group_LE[place]

    @property
    def _open_LE(self) -> np.ndarray:
        room_L = self.left_LE.sum(axis=1) > self._least
        return self.left_LE & self._free_LE & room_L[:, None]

    def _best_pair(self, layer: int, likeness_EE: np.ndarray) -> tuple[float, Removal] | None:
        number = len(likeness_EE)
        turn_E, group_E = self._turn_LE[layer, :number], self._group_LE[layer, :number]
        allowed_EE = self._open_LE[layer, :number, None] & self.left_LE[layer, :number]
        allowed_EE &= (turn_E[:, None] < turn_E) & (group_E[:, None] + group_E <= self._largest)
        if not allowed_EE.any():
            return None
        place = int(np.where(allowed_EE, likeness_EE, -np.inf).argmax())
        gone, into = divmod(place, number)
        return float(likeness_EE[gone, into]), Removal(layer, gone, into)
