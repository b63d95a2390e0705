"""Balanced k-means over the neurons of an FFN: the experts of EMoE (Qiu et al., 2023, arXiv:2310.10908)."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from configs.choices import Clustering, check_choice
from configs.errors import UserError
from experts.flow_kmeans import flow_labels

# Mean distance to which features are scaled for k-means-constrained, which rounds distances to a thousandth.
_PACKAGE_DISTANCE = 10.0


@dataclass(frozen=True)
class Clusters:
    """Partition of the neurons of one layer into clusters of equal size.

    Attributes:
        members: int64 ``[E, m / E]``, the neurons of each cluster in ascending order.
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
    """Divisors of ``num_neurons``, the valid numbers of experts, ascending."""
    return [count for count in range(1, num_neurons + 1) if num_neurons % count == 0]


def check_expert_count(num_neurons: int, num_experts: int) -> None:
    """Check that E divides the FFN width.

    Raises:
        UserError: lists the nearest valid E.
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
    """Check that a clustering exists and that its package is installed.

    Raises:
        UserError: lists the choices, or names the extra to install.
    """
    check_choice("`clustering`", clustering, Clustering)
    if (
        clustering == Clustering.K_MEANS_CONSTRAINED
        and importlib.util.find_spec("k_means_constrained") is None
    ):
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
        clustering: see ``configs.choices.Clustering``.
        seed: seed of the sketch and of the initial centers.
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
        return _describe(features, np.arange(len(features)) // size, num_experts)
    solve, defaults = _SOLVERS[clustering]
    labels = solve(features, num_experts, seed, restarts or defaults[0], max_iterations or defaults[1])
    return _describe(features, labels, num_experts)


def timed_clusters(
    features: np.ndarray, num_experts: int, seed: int, clustering: str = "flow"
) -> tuple[Clusters, float]:
    """``balanced_clusters`` and its wall time in seconds; defined here so that worker processes import no model."""
    start = time.perf_counter()
    clusters = balanced_clusters(features, num_experts, clustering=clustering, seed=seed)
    return clusters, time.perf_counter() - start


def random_clusters(num_neurons: int, num_experts: int, *, seed: int = 0) -> np.ndarray:
    """Random partition of neurons into equal experts, ``[E, m / E]``: the baseline of clustering."""
    check_expert_count(num_neurons, num_experts)
    shuffled = np.random.default_rng(seed).permutation(num_neurons)
    return np.sort(shuffled.reshape(num_experts, -1), axis=1)


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


def _describe(features: np.ndarray, labels: np.ndarray, num_experts: int) -> Clusters:
    members = np.stack([np.flatnonzero(labels == expert) for expert in range(num_experts)])
    # One expert at a time, because a copy of all features would double the memory.
    centers = np.stack([features[rows].mean(axis=0) for rows in members])
    within = sum(
        float(((features[rows] - center) ** 2).sum()) for rows, center in zip(members, centers, strict=True)
    )
    between = ((centers - features.mean(axis=0)) ** 2).sum(axis=-1)
    return Clusters(members, within, within / len(features), float(between.mean()))


# By clustering: the function from features to labels, and its default restarts and iterations.
_SOLVERS: dict[str, tuple[Callable[..., np.ndarray], tuple[int, int]]] = {
    Clustering.FLOW: (flow_labels, (1, 30)),
    Clustering.K_MEANS_CONSTRAINED: (_package_labels, (10, 300)),
}
