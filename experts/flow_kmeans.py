"""Balanced k-means with minimum-cost-flow assignments (Bradley, Bennett and Demiriz, 2000, MSR-TR-2000-65)."""

from __future__ import annotations

import warnings

import numpy as np
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow
from scipy.cluster.vq import kmeans2

# Width of the sketch for the initial centers, and number of steps of plain k-means on it.
_SKETCH_WIDTH, _PLAIN_STEPS = 64, 10
# Most clusters whose initial centers are drawn by k-means++; the centers of more are random neurons, which on 218
# clusters of 6 takes a tenth of the time and ends at an inertia that is 0.3 % smaller.
_MOST_PLUS_PLUS = 64
# Flow costs are integers: the mean cost of an assignment is rounded to this many units.
_COST_UNITS = 10_000
# Relative decrease of the inertia below which the iteration ends.
_TOLERANCE = 1e-4


def flow_labels(
    features: np.ndarray, num_experts: int, seed: int, restarts: int, max_iterations: int
) -> np.ndarray:
    """Cluster of each neuron, int64 ``[m]``, by k-means whose assignments are minimum-cost flows.

    Args:
        features: ``[m, F]``, finite, one row a neuron.
        num_experts: E, divides m.
        seed: seed of the sketch and of the initial centers.
        restarts: independent initializations, of which the best is kept.
        max_iterations: most balanced steps of one run.
    """
    centered = features - features.mean(axis=0)
    rng = np.random.default_rng(seed)
    runs = [
        _balance(centered, _plain_labels(centered, num_experts, rng), num_experts, max_iterations)
        for _ in range(restarts)
    ]
    return min(runs, key=lambda run: run[0])[1]


def _plain_labels(centered: np.ndarray, num_experts: int, rng: np.random.Generator) -> np.ndarray:
    """Labels ``[m]`` of unbalanced k-means on a sketch, a fast initialization of the balanced steps."""
    # Identical neurons give k-means++ zero distances; empty clusters are filled by the balanced steps.
    start = "++" if num_experts <= _MOST_PLUS_PLUS else "points"
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        return kmeans2(_sketch(centered, rng), num_experts, iter=_PLAIN_STEPS, minit=start, rng=rng)[1]


def _sketch(centered: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Project on the leading singular directions by a randomized range finder with one power step (arXiv:0909.4061)."""
    if centered.shape[1] <= _SKETCH_WIDTH:
        return centered
    probe = rng.standard_normal((centered.shape[1], _SKETCH_WIDTH)).astype(centered.dtype)
    return centered @ np.linalg.qr(centered.T @ (centered @ probe))[0]


def _balance(
    centered: np.ndarray, labels: np.ndarray, num_experts: int, max_iterations: int
) -> tuple[float, np.ndarray]:
    """Lloyd's algorithm with balanced assignments: inertia and labels ``[m]``."""
    size = len(centered) // num_experts
    spread = float(np.einsum("mf,mf->", centered, centered, dtype=np.float64))
    lowest, best = np.inf, labels
    centers = _centers(centered, labels, num_experts)
    for _ in range(max_iterations):
        # Squared distances without the neurons' norms, on which assignments do not depend.
        labels = balanced_assignment(np.square(centers).sum(axis=1) - 2 * (centered @ centers.T))
        centers = _centers(centered, labels, num_experts)
        inertia = spread - size * float(np.square(centers, dtype=np.float64).sum())
        settled = inertia >= lowest * (1 - _TOLERANCE)
        if inertia < lowest:
            lowest, best = inertia, labels
        if settled:
            break
    return lowest, best


def _centers(centered: np.ndarray, labels: np.ndarray, num_experts: int) -> np.ndarray:
    """Mean of each cluster's neurons, ``[E, F]``; zero, the mean of all neurons, for an empty cluster."""
    member = np.eye(num_experts, dtype=centered.dtype)[labels]
    return (member.T @ centered) / np.maximum(member.sum(axis=0), 1)[:, None]


def balanced_assignment(costs: np.ndarray) -> np.ndarray:
    """Balanced assignment of neurons to experts of least total cost, as a minimum-cost flow.

    Args:
        costs: ``[m, E]``, finite; E divides m. Differences to a neuron's least cost are rounded to 1e-4 of their mean.

    Returns:
        int64 ``[m]``, the expert of each neuron.
    """
    num_neurons, num_experts = costs.shape
    above = costs - costs.min(axis=1, keepdims=True)
    units = np.rint(above * (_COST_UNITS / max(float(above.mean()), 1e-30))).astype(np.int64)
    neurons = np.arange(num_neurons, dtype=np.int32)
    experts = np.arange(num_neurons, num_neurons + num_experts, dtype=np.int32)
    flow = SimpleMinCostFlow()
    arcs = flow.add_arcs_with_capacity_and_unit_cost(
        neurons.repeat(num_experts),
        np.tile(experts, num_neurons),
        np.ones(costs.size, np.int64),
        units.ravel(),
    )
    flow.set_nodes_supplies(neurons, np.ones(num_neurons, np.int64))
    flow.set_nodes_supplies(experts, np.full(num_experts, -(num_neurons // num_experts)))
    if flow.solve() != flow.OPTIMAL:
        raise RuntimeError(f"no balanced assignment of {num_neurons} neurons to {num_experts} experts")
    return flow.flows(arcs).reshape(costs.shape).argmax(axis=1)
