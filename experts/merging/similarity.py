"""How alike two experts of a layer are: in their weights, and in the tokens that visit them.

Shape suffixes: D hidden width, E experts, H neurons per expert, T tokens, B bytes of one bit per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from experts.merging.alignment import align_neurons, check_alignment

# gate_up [2H, D] and down [D, H] of an expert.
Matrices = tuple[np.ndarray, np.ndarray]


class PairLikeness:
    """Likeness of the experts of one layer, which follows as experts go into others. Numbers never change.

    Attributes:
        cosine_EE: of weights (see ``weight_cosines``).
        visits_EB: packed bits, which tokens visit which expert.
        jaccard_EE: of visits (see ``jaccard``).
    """

    def __init__(self, cosine_EE: np.ndarray, visits_EB: np.ndarray) -> None:
        self.cosine_EE, self.visits_EB = cosine_EE.copy(), visits_EB.copy()
        self.jaccard_EE = jaccard(visits_EB)

    @property
    def likeness_EE(self) -> np.ndarray:
        """Mean of cosine and Jaccard.

        The cosine tells whether an average still computes what both did, the Jaccard whether tokens that lose one
        expert are at the other anyway. A product would be zero wherever one of them is for all pairs: with one
        expert a token no two experts share a token, and experts cut from one FFN share no neuron.
        """
        return (self.cosine_EE + self.jaccard_EE) / 2

    def merge(self, into: int, gone: int, cosines: Mapping[int, float]) -> None:
        """Expert ``gone`` goes into ``into``, which then serves the tokens of both.

        Args:
            into: the expert that stays.
            gone: the expert that goes.
            cosines: between the weights of ``into`` after the merge and other experts.
        """
        self.visits_EB[into] |= self.visits_EB[gone]
        row_E = jaccard_row(self.visits_EB, into)
        self.jaccard_EE[into], self.jaccard_EE[:, into] = row_E, row_E
        for other, cosine in cosines.items():
            self.cosine_EE[into, other] = self.cosine_EE[other, into] = cosine


def pack_visits(visited_ET: np.ndarray) -> np.ndarray:
    """Bool ``[E, T]`` as bits, uint8 ``[E, B]``; what is left of the last byte is zero, as if nobody visited."""
    return np.packbits(visited_ET, axis=1)


def jaccard(visits_EB: np.ndarray) -> np.ndarray:
    """Tokens that visit both experts over tokens that visit either, ``[E, E]``; 0 where none visits either."""
    rows = [jaccard_row(visits_EB, expert) for expert in range(len(visits_EB))]
    return np.stack(rows)


def jaccard_row(visits_EB: np.ndarray, expert: int) -> np.ndarray:
    """The row ``[E]`` of one expert in ``jaccard``."""
    both_E = np.bitwise_count(visits_EB & visits_EB[expert]).sum(axis=1, dtype=np.int64)
    either_E = np.bitwise_count(visits_EB | visits_EB[expert]).sum(axis=1, dtype=np.int64)
    return both_E / np.maximum(either_E, 1)


def weight_cosines(experts: Sequence[Matrices], alignment: str) -> np.ndarray:
    """Cosine ``[E, E]`` between the experts' weights, gate_up and down flattened together.

    Args:
        experts: of one layer.
        alignment: of one expert's neurons to the other's, before they are compared (see
            ``experts.merging.alignment.align_neurons``); ``centroid`` solves an assignment for each pair.
    """
    check_alignment(alignment)
    if alignment == "none":
        flat = np.stack([_unit(expert) for expert in experts])
        return (flat @ flat.T).astype(np.float64)
    cosine_EE = np.eye(len(experts))
    for expert, matrices in enumerate(experts):
        row = [weight_cosine(other, matrices, alignment) for other in experts[:expert]]
        cosine_EE[expert, :expert] = cosine_EE[:expert, expert] = row
    return cosine_EE


def weight_cosine(one: Matrices, other: Matrices, alignment: str) -> float:
    """Cosine between the weights of two experts, ``one`` aligned to ``other``; 0 where either is all zero."""
    return float(_unit(align_neurons(*one, *other, alignment)) @ _unit(other))


def _unit(expert: Matrices) -> np.ndarray:
    flat = np.concatenate([part.ravel() for part in expert])
    return flat / max(float(np.linalg.norm(flat)), 1e-30)
