"""A slow reference of one layer of an expert graph: one token at a time, plain Python, no vectorized step.

It follows the definition step by step and shares no code with ``models``, so that the two can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NOBODY = -1


@dataclass(frozen=True)
class Visit:
    """One visit of a token: the expert, its best-scoring visited parent (-1: none), its effective score."""

    expert: int
    parent: int
    score: float


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, numpy fp64: ``gate``, ``up`` and ``down`` are ``[E, H, D]`` (``down`` transposed)."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    router: np.ndarray
    mask: np.ndarray
    edge_gain: np.ndarray
    edge_affinity: np.ndarray
    output_gain: np.ndarray


def walk_token(
    scores: Sequence[float],
    mask: np.ndarray,
    affinity: np.ndarray,
    resident: Sequence[bool],
    num_visits: int,
    order: str,
) -> list[Visit]:
    """The visits of one token, in order; fewer than ``num_visits`` where no candidate is left."""
    visits: list[Visit] = []
    while len(visits) < num_visits:
        candidates = _candidates(scores, mask, affinity, resident, visits)
        if order == "depth-first":
            candidates = _on_latest_branch(candidates, mask, visits)
        if not candidates:
            break
        best = max(candidates.values())
        expert = min(candidate for candidate, score in candidates.items() if score == best)
        visits.append(Visit(expert, _parent(expert, mask, visits), best))
    return visits


def layer_token(x: np.ndarray, layer: Layer, visits: Sequence[Visit]) -> np.ndarray:
    """The layer's output ``[D]`` for the token ``x [D]`` that made ``visits``."""
    score_of = {visit.expert: visit.score for visit in visits}
    outputs: dict[int, np.ndarray] = {}
    for expert in sorted(score_of):
        passed = [layer.edge_gain[p, expert] * outputs[p] for p in outputs if layer.mask[p, expert]]
        outputs[expert] = _ffn(x + sum(passed, np.zeros_like(x)), layer, expert)
    total = np.zeros_like(x)
    normalizer = sum(math.exp(score - max(score_of.values())) for score in score_of.values())
    for expert, output in outputs.items():
        share = math.exp(score_of[expert] - max(score_of.values())) / normalizer
        total = total + (1 + layer.output_gain[expert] * share) * output
    return total


def layer_tokens(
    inputs: np.ndarray, layer: Layer, resident: Sequence[bool], num_visits: int, order: str
) -> np.ndarray:
    """The layer's outputs ``[T, D]`` for the tokens ``inputs [T, D]``."""
    rows = []
    for x in inputs:
        scores = [float(row @ x) for row in layer.router]
        visits = walk_token(scores, layer.mask, layer.edge_affinity, resident, num_visits, order)
        rows.append(layer_token(x, layer, visits))
    return np.array(rows).reshape(inputs.shape)


def _candidates(
    scores: Sequence[float],
    mask: np.ndarray,
    affinity: np.ndarray,
    resident: Sequence[bool],
    visits: Sequence[Visit],
) -> dict[int, float]:
    """Effective score of every expert that can be visited next."""
    visited = [visit.expert for visit in visits]
    candidates = {}
    for expert, score in enumerate(scores):
        if expert in visited or not resident[expert]:
            continue
        bonuses = [float(affinity[parent, expert]) for parent in visited if mask[parent, expert]]
        if bonuses:
            candidates[expert] = score + max(bonuses)
        elif mask[expert, expert]:
            candidates[expert] = score
    return candidates


def _on_latest_branch(
    candidates: dict[int, float], mask: np.ndarray, visits: Sequence[Visit]
) -> dict[int, float]:
    """Depth first: the children of the latest visit that has one left, else every candidate."""
    for visit in reversed(visits):
        children = {expert: score for expert, score in candidates.items() if mask[visit.expert, expert]}
        if children:
            return children
    return candidates


def _parent(expert: int, mask: np.ndarray, visits: Sequence[Visit]) -> int:
    """The visited parent of highest effective score; the earliest of those that tie."""
    parents = [visit for visit in visits if mask[visit.expert, expert]]
    return max(parents, key=lambda visit: visit.score).expert if parents else NOBODY


def _ffn(x: np.ndarray, layer: Layer, expert: int) -> np.ndarray:
    gate = layer.gate[expert] @ x
    hidden = gate * (1 + np.tanh(gate / 2)) / 2 * (layer.up[expert] @ x)  # SiLU, without overflow
    return hidden @ layer.down[expert]
