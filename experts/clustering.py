"""Balanced k-means over the neurons of an FFN: the experts of EMoE (Qiu et al., 2023, arXiv:2310.10908)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from k_means_constrained import KMeansConstrained

from configs.errors import UserError


@dataclass(frozen=True)
class Clusters:
    """Neurons of one layer, dealt to experts of equal size.

    Attributes:
        members: int64 ``[E, m / E]``, the neurons of each expert in ascending order.
        inertia: sum of squared distances of the neurons to the centre of their expert.
        variance_within: mean squared distance of a neuron to its centre.
        variance_between: mean squared distance of a neuron's centre to the centre of all.
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


def balanced_clusters(
    features: np.ndarray, num_experts: int, *, seed: int = 0, restarts: int = 1, max_iterations: int = 30
) -> Clusters:
    """Cluster neurons into experts of exactly ``m / E`` with minimum-cost-flow k-means.

    Args:
        features: ``[m, F]``, one row a neuron.
        num_experts: E; must divide m.
        seed: of the k-means++ initialisation.
        restarts: independent initialisations, of which the best is kept.
        max_iterations: of one k-means run.

    Raises:
        UserError: E does not divide m, or a feature is not finite.
    """
    num_neurons = len(features)
    check_expert_count(num_neurons, num_experts)
    if not np.isfinite(features).all():
        raise UserError(
            "expected finite features of every neuron, got NaN or Inf; check the checkpoint's FFN weights"
        )
    labels = _labels(features, num_experts, seed, restarts, max_iterations)
    return _describe(features, labels, num_experts)


def timed_clusters(features: np.ndarray, num_experts: int, seed: int) -> tuple[Clusters, float]:
    """``balanced_clusters`` and the seconds that they took; here, so that worker processes import no model."""
    start = time.perf_counter()
    clusters = balanced_clusters(features, num_experts, seed=seed)
    return clusters, time.perf_counter() - start


def random_clusters(num_neurons: int, num_experts: int, *, seed: int = 0) -> np.ndarray:
    """Deal neurons to equal experts at random, ``[E, m / E]``: the baseline that clustering has to beat."""
    check_expert_count(num_neurons, num_experts)
    shuffled = np.random.default_rng(seed).permutation(num_neurons)
    return np.sort(shuffled.reshape(num_experts, -1), axis=1)


def _labels(
    features: np.ndarray, num_experts: int, seed: int, restarts: int, max_iterations: int
) -> np.ndarray:
    size = len(features) // num_experts
    if num_experts == 1 or size == 1:
        return np.arange(len(features)) // size
    model = KMeansConstrained(
        n_clusters=num_experts,
        size_min=size,
        size_max=size,
        n_init=restarts,
        max_iter=max_iterations,
        random_state=seed,
        n_jobs=1,
    )
    return model.fit_predict(features.astype(np.float64))


def _describe(features: np.ndarray, labels: np.ndarray, num_experts: int) -> Clusters:
    members = np.stack([np.flatnonzero(labels == expert) for expert in range(num_experts)])
    centres = features[members].mean(axis=1)
    within = ((features[members] - centres[:, None]) ** 2).sum(axis=-1)
    between = ((centres - features.mean(axis=0)) ** 2).sum(axis=-1)
    return Clusters(members, float(within.sum()), float(within.mean()), float(between.mean()))
