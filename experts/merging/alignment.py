"""Merging of experts: optimal grouping, alignment of neurons, weighted average.

REAM (Jha et al. 2026, "REAM: Merging Improves Pruning of Experts in LLMs", arXiv:2604.04356) keeps the most salient
experts as centroids and merges each other one into a centroid that behaves like it.
Shape suffixes: D hidden width, E experts, H neurons per expert, C centroids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from configs.choices import Alignment, check_choice
from configs.errors import UserError


def group_experts(
    similarity_EE: np.ndarray, centroids: np.ndarray, max_group_size: int
) -> dict[int, list[int]]:
    """Assign every other expert to a centroid, maximizing the sum of similarities (Hungarian algorithm).

    REAM fills groups one after another in order of saliency; the optimal assignment is cheap for some hundred experts
    and does not depend on that order.

    Args:
        similarity_EE: similarity of experts.
        centroids: numbers of the experts that stay, ascending.
        max_group_size: largest number of experts in a group, its centroid included.

    Returns:
        By centroid, the experts of its group: the centroid, then the others ascending.

    Raises:
        UserError: no centroid, or groups that cannot hold all experts.
    """
    if not len(centroids):
        raise UserError("expected an expert to merge the others into, got none that stays and is not shared")
    others = np.setdiff1d(np.arange(len(similarity_EE)), centroids)
    places = len(centroids) * (max_group_size - 1)
    if len(others) > places:
        needed = -(-len(similarity_EE) // len(centroids))
        raise UserError(
            f"expected groups that hold {len(others)} experts beside {len(centroids)} centroids, got a largest group "
            f"size of {max_group_size}; allow {needed} or keep more experts"
        )
    groups = {int(centroid): [int(centroid)] for centroid in centroids}
    if len(others):
        offered = np.repeat(centroids, max_group_size - 1)
        rows, columns = linear_sum_assignment(similarity_EE[np.ix_(others, offered)], maximize=True)
        for row, column in zip(rows, columns, strict=True):
            groups[int(offered[column])].append(int(others[row]))
    return groups


def align_neurons(
    gate_up: np.ndarray, down: np.ndarray, to_gate_up: np.ndarray, to_down: np.ndarray, alignment: str
) -> tuple[np.ndarray, np.ndarray]:
    """Align an expert's neurons to those of another expert; the expert's function stays the same.

    ``sign`` flips a neuron's up row together with its down column, which leaves a gated FFN unchanged; ``centroid``
    also permutes the neurons to maximize the inner products with the other's (Hungarian algorithm, signs included).

    Args:
        gate_up: weights ``[2H, D]`` of the expert.
        down: weights ``[D, H]`` of the expert.
        to_gate_up: weights of the other expert.
        to_down: weights of the other expert.
        alignment: see ``configs.choices.Alignment``.

    Returns:
        Aligned ``gate_up`` and ``down``.
    """
    check_choice("`alignment`", alignment, Alignment)
    if alignment == "none":
        return gate_up, down
    (gate, up), (to_gate, to_up) = np.split(gate_up, 2), np.split(to_gate_up, 2)
    down_rows, to_down_rows = down.T, to_down.T
    if alignment == "centroid":
        signed = np.abs(to_up @ up.T + to_down_rows @ down_rows.T)
        order = linear_sum_assignment(to_gate @ gate.T + signed, maximize=True)[1]
        gate, up, down_rows = gate[order], up[order], down_rows[order]
    likeness = (to_up * up).sum(axis=1) + (to_down_rows * down_rows).sum(axis=1)
    sign = np.where(likeness < 0, -1, 1).astype(up.dtype)[:, None]
    return np.concatenate([gate, up * sign]), (down_rows * sign).T


def average_experts(
    experts: Sequence[tuple[np.ndarray, np.ndarray]], weights: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted average of experts' ``gate_up`` and ``down``; unweighted where all weights are zero.

    Raises:
        UserError: a weight below zero or not finite.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if not (np.isfinite(shares).all() and (shares >= 0).all()):
        raise UserError(f"expected saliencies of at least 0 as weights, got {list(weights)}")
    shares = shares / shares.sum() if shares.sum() else np.full(len(shares), 1 / len(shares))
    gate_up, down = (
        sum(share * np.asarray(part, dtype=np.float64) for share, part in zip(shares, parts, strict=True))
        for parts in zip(*experts, strict=True)
    )
    return gate_up, down
