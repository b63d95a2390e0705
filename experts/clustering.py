"""Balanced k-means over the neurons of an FFN: the experts of EMoE (Qiu et al., 2023, arXiv:2310.10908)."""

from __future__ import annotations

import importlib.util
import time
import warnings
from dataclasses import dataclass

import numpy as np
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow
from scipy.cluster.vq import kmeans2

from configs.errors import UserError

# Solvers of the balanced assignments: OR-Tools called once per step, or the package k-means-constrained.
CLUSTERINGS = ("flow", "k-means-constrained")

# Width of the sketch on which plain k-means finds the first centers, and the steps that it takes there.
_SKETCH_WIDTH, _PLAIN_STEPS = 64, 10
# Flow costs are integers; this many of them make up the mean cost of a place.
_COST_UNITS = 10_000
# A step that lowers the inertia by less than this share is the last one.
_TOLERANCE = 1e-4
# Initializations of k-means-constrained, its own default, and the mean distance to which features are scaled for it:
# it rounds distances to a thousandth.
_PACKAGE_RESTARTS, _PACKAGE_DISTANCE = 10, 10.0


@dataclass(frozen=True)
class Clusters:
    """Neurons of one layer, dealt to experts of equal size.

    Attributes:
        members: int64 ``[E, m / E]``, the neurons of each expert in ascending order.
        inertia: sum of squared distances of the neurons to the center of their expert.
        variance_within: mean squared distance of a neuron to its center.
        variance_between: mean squared distance of a neuron's center to the center of all.
    """

    members: np.ndarray
    inertia: float
    variance_within: float
    variance_between: float

    @property
    def sizes(self) -> list[int]:
        """Neurons per expert."""
        return [self.members.shape[1]] * len(self.members)


def valid_expert_counts(num_neurons: int) -> list[int]:
    """Every E that deals ``num_neurons`` into experts of equal size, ascending."""
    return [count for count in range(1, num_neurons + 1) if num_neurons % count == 0]


def check_expert_count(num_neurons: int, num_experts: int) -> None:
    """Refuse an E that does not divide the FFN width.

    Raises:
        UserError: lists the valid E nearest to the one asked for.
    """
    valid = valid_expert_counts(num_neurons)
    if num_experts in valid:
        return
    near = sorted(sorted(valid, key=lambda count: abs(count - num_experts))[:4])
    raise UserError(
        f"expected a number of experts that divides the FFN width {num_neurons}, got {num_experts}; "
        f"the nearest that do: {', '.join(map(str, near))}"
    )


def check_clustering(clustering: str) -> None:
    """Refuse a clustering that is unknown or whose package is not installed.

    Raises:
        UserError: lists the choices, or names the extra to install.
    """
    if clustering not in CLUSTERINGS:
        raise UserError(f"expected clustering to be one of {', '.join(CLUSTERINGS)}, got {clustering!r}")
    if clustering == "k-means-constrained" and importlib.util.find_spec("k_means_constrained") is None:
        raise UserError(
            "expected the package k-means-constrained for this clustering, found none; "
            "install the extra: bash scripts/install.sh clustering"
        )


def balanced_clusters(
    features: np.ndarray,
    num_experts: int,
    *,
    clustering: str = "flow",
    seed: int = 0,
    restarts: int | None = None,
    max_iterations: int | None = None,
) -> Clusters:
    """Cluster neurons into experts of exactly ``m / E`` with k-means whose assignments are minimum-cost flows.

    The method is constrained k-means (Bradley, Bennett and Demiriz, 2000, MSR-TR-2000-65) on squared distances.
    ``flow`` starts from unbalanced k-means on a sketch of the features; ``k-means-constrained`` is the package of that
    name, as in EMoE, with its own initialization and on distances that are not squared.

    Args:
        features: ``[m, F]``, one row a neuron.
        num_experts: E; must divide m.
        clustering: one of ``CLUSTERINGS``.
        seed: seed of the sketch and the k-means++ initialization.
        restarts: independent initializations, of which the best is kept; None for 1 (flow) or 10.
        max_iterations: most balanced steps of one run; None for 30 (flow) or 300.

    Raises:
        UserError: E does not divide m, a feature is not finite, or the clustering is not available.
    """
    check_clustering(clustering)
    check_expert_count(len(features), num_experts)
    if not np.isfinite(features).all():
        raise UserError(
            "expected finite features of every neuron, got NaN or Inf; check the checkpoint's FFN weights"
        )
    size = len(features) // num_experts
    if num_experts == 1 or size == 1:
        labels = np.arange(len(features)) // size
    elif clustering == "flow":
        labels = _flow_labels(features, num_experts, seed, restarts or 1, max_iterations or 30)
    else:
        labels = _package_labels(
            features, num_experts, seed, restarts or _PACKAGE_RESTARTS, max_iterations or 300
        )
    return _describe(features, labels, num_experts)


def timed_clusters(
    features: np.ndarray, num_experts: int, seed: int, clustering: str = "flow"
) -> tuple[Clusters, float]:
    """``balanced_clusters`` and its wall time in seconds; defined here so that worker processes import no model."""
    start = time.perf_counter()
    clusters = balanced_clusters(features, num_experts, clustering=clustering, seed=seed)
    return clusters, time.perf_counter() - start


def random_clusters(num_neurons: int, num_experts: int, *, seed: int = 0) -> np.ndarray:
    """Deal neurons to equal experts at random, ``[E, m / E]``: the baseline that clustering has to beat."""
    check_expert_count(num_neurons, num_experts)
    shuffled = np.random.default_rng(seed).permutation(num_neurons)
    return np.sort(shuffled.reshape(num_experts, -1), axis=1)


def _flow_labels(
    features: np.ndarray, num_experts: int, seed: int, restarts: int, max_iterations: int
) -> np.ndarray:
    centered = features - features.mean(axis=0)
    rng = np.random.default_rng(seed)
    runs = [
        _balance(centered, _plain_labels(centered, num_experts, rng), num_experts, max_iterations)
        for _ in range(restarts)
    ]
    return min(runs, key=lambda run: run[0])[1]


def _package_labels(
    features: np.ndarray, num_experts: int, seed: int, restarts: int, max_iterations: int
) -> np.ndarray:
    """Labels ``[m]`` of the package k-means-constrained with lower and upper size limit ``m / E``."""
    from k_means_constrained import KMeansConstrained

    size = len(features) // num_experts
    centered = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    distance = float(np.sqrt(np.square(centered).sum(axis=1)).mean())
    model = KMeansConstrained(
        num_experts,
        size_min=size,
        size_max=size,
        n_init=restarts,
        max_iter=max_iterations,
        random_state=seed % 2**32,
    )
    labels = np.asarray(model.fit_predict(centered * (_PACKAGE_DISTANCE / (distance or 1.0))))
    counts = np.bincount(labels, minlength=num_experts)
    if (counts != size).any():
        raise RuntimeError(
            f"k-means-constrained returned clusters of {counts.tolist()} neurons, not of {size}"
        )
    return labels


def _plain_labels(centered: np.ndarray, num_experts: int, rng: np.random.Generator) -> np.ndarray:
    """Labels ``[m]`` of unbalanced k-means on a sketch: quick, and the balanced steps have little left to do."""
    # Neurons that are all alike leave nothing to draw centers by, and the balanced steps fill empty clusters.
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        return kmeans2(_sketch(centered, rng), num_experts, iter=_PLAIN_STEPS, minit="++", rng=rng)[1]


def _sketch(centered: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Project on the leading directions, by one power iteration of the randomized range finder (arXiv:0909.4061)."""
    if centered.shape[1] <= _SKETCH_WIDTH:
        return centered
    probe = rng.standard_normal((centered.shape[1], _SKETCH_WIDTH)).astype(centered.dtype)
    return centered @ np.linalg.qr(centered.T @ (centered @ probe))[0]


def _balance(
    centered: np.ndarray, labels: np.ndarray, num_experts: int, max_iterations: int
) -> tuple[float, np.ndarray]:
    """Lloyd's algorithm with balanced assignments: the inertia, and the labels ``[m]``."""
    size = len(centered) // num_experts
    spread = float(np.einsum("mf,mf->", centered, centered, dtype=np.float64))
    lowest, best = np.inf, labels
    centers = _centers(centered, labels, num_experts)
    for _ in range(max_iterations):
        # Squared distances but for the neurons' own norms, which no assignment depends on.
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
    """Mean of each cluster's neurons, ``[E, F]``; zero, the mean of all, where a cluster has none."""
    member = np.eye(num_experts, dtype=centered.dtype)[labels]
    return (member.T @ centered) / np.maximum(member.sum(axis=0), 1)[:, None]


def balanced_assignment(costs: np.ndarray) -> np.ndarray:
    """Give every expert equally many neurons at the least total cost, as a minimum-cost flow.

    Args:
        costs: ``[m, E]``, finite; E divides m. Resolved to a ten-thousandth of the mean cost above a neuron's least.

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


def _describe(features: np.ndarray, labels: np.ndarray, num_experts: int) -> Clusters:
    members = np.stack([np.flatnonzero(labels == expert) for expert in range(num_experts)])
    # Expert by expert: copies of all features would double the memory.
    centers = np.stack([features[rows].mean(axis=0) for rows in members])
    within = sum(
        float(((features[rows] - center) ** 2).sum()) for rows, center in zip(members, centers, strict=True)
    )
    between = ((centers - features.mean(axis=0)) ** 2).sum(axis=-1)
    return Clusters(members, within, within / len(features), float(between.mean()))
