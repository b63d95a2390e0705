"""Similarity of two experts of a layer: cosine of weights, Jaccard index of routed tokens.

Shape suffixes: D hidden width, E experts, H neurons per expert, T tokens, B bytes of one bit per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from configs.choices import Alignment, check_choice
from experts.merging.alignment import align_neurons

# gate_up [2H, D] and down [D, H] of an expert.
Matrices = tuple[np.ndarray, np.ndarray]


class PairLikeness:
    """Pairwise similarity of the experts of one layer, updated as experts are merged. Numbers never change.

    Attributes:
        cosine_EE: cosine of weights (see ``weight_cosines``).
        visits_EB: packed bits of the tokens routed to each expert.
        jaccard_EE: Jaccard index of these token sets (see ``jaccard``).
    """

    def __init__(self, cosine_EE: np.ndarray, visits_EB: np.ndarray) -> None:
        self.cosine_EE, self.visits_EB = cosine_EE.copy(), visits_EB.copy()
        self.jaccard_EE = jaccard(visits_EB)

    @property
    def likeness_EE(self) -> np.ndarray:
        """Mean of cosine and Jaccard index.

        A high cosine means that an average preserves both functions, a high Jaccard index that the tokens of one expert
        already visit the other. A product would vanish where one factor is zero for all pairs: with top-1 routing no
        two experts share a token, and experts cut from one FFN share no neuron.
        """
        return (self.cosine_EE + self.jaccard_EE) / 2

    def merge(self, into: int, gone: int, cosines: Mapping[int, float]) -> None:
        """Update the similarities after a merge of ``gone`` into ``into``, which then has the tokens of both.

        Args:
            into: expert that stays.
            gone: removed expert.
            cosines: by other expert, cosine with the weights of ``into`` after the merge.
        """
        self.visits_EB[into] |= self.visits_EB[gone]
        row_E = jaccard_row(self.visits_EB, into)
        self.jaccard_EE[into], self.jaccard_EE[:, into] = row_E, row_E
        for other, cosine in cosines.items():
            self.cosine_EE[into, other] = self.cosine_EE[other, into] = cosine


def pack_visits(visited_ET: np.ndarray) -> np.ndarray:
    """Pack bool ``[E, T]`` into bits, uint8 ``[E, B]``; the last byte is padded with zeros."""
    return np.packbits(visited_ET, axis=1)


def jaccard(visits_EB: np.ndarray) -> np.ndarray:
    """Jaccard index ``[E, E]`` of the experts' token sets; 0 where both are empty."""
    rows = [jaccard_row(visits_EB, expert) for expert in range(len(visits_EB))]
    return np.stack(rows)


def jaccard_row(visits_EB: np.ndarray, expert: int) -> np.ndarray:
    """Row ``[E]`` of one expert in ``jaccard``."""
    both_E = np.bitwise_count(visits_EB & visits_EB[expert]).sum(axis=1, dtype=np.int64)
    either_E = np.bitwise_count(visits_EB | visits_EB[expert]).sum(axis=1, dtype=np.int64)
    return both_E / np.maximum(either_E, 1)


def weight_cosines(experts: Sequence[Matrices], alignment: str) -> np.ndarray:
    """Cosine similarity ``[E, E]`` of the experts' weights, gate_up and down flattened together.

    Args:
        experts: weights of the experts of one layer.
        alignment: alignment of one expert's neurons to the other's before comparison (see
            ``experts.merging.alignment.align_neurons``); ``centroid`` solves an assignment for each pair.
    """
    check_choice("`alignment`", alignment, Alignment)
    if alignment == "none":
        flat = np.stack([_unit(expert) for expert in experts])
        return (flat @ flat.T).astype(np.float64)
    cosine_EE = np.eye(len(experts))
    for expert, matrices in enumerate(experts):
        row = [weight_cosine(other, matrices, alignment) for other in experts[:expert]]
        cosine_EE[expert, :expert] = cosine_EE[:expert, expert] = row
    return cosine_EE


def weight_cosine(one: Matrices, other: Matrices, alignment: str) -> float:
    """Cosine similarity of two experts' weights, ``one`` aligned to ``other``; 0 where either is all zero."""
    return float(_unit(align_neurons(*one, *other, alignment)) @ _unit(other))


def _unit(expert: Matrices) -> np.ndarray:
    flat = np.concatenate([part.ravel() for part in expert])
    return flat / max(float(np.linalg.norm(flat)), 1e-30)
