"""Balanced k-means of neurons: time for one layer of a 7B Llama, and inertia relative to ``k-means-constrained``.

``seconds_7b_layer`` is the median time of ``experts.clustering.balanced_clusters`` on 11008 x 4096 synthetic gate rows
with 16 experts. ``objective_ratio`` is the inertia of its clusters over that of the package ``k-means-constrained`` run
to convergence from several initializations, on the gate rows of a trained Llama, averaged over layers.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
from k_means_constrained import KMeansConstrained

from benchmarks.support.material import model_path
from benchmarks.support.runner import Measured, OnStep, run_benchmark
from experts.clustering import balanced_clusters
from models.checkpoints.load import load_dense

_INITIALIZATIONS, _REPEATS = 3, 5


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Time one layer at several expert counts and compare the objective at two.

    Args:
        quick: use a small layer, and two layers of the embedded model.
        on_step: called with the stage, the number of steps done and their total.
    """
    seconds = layer_seconds(
        shape=(512, 128) if quick else (11008, 4096),
        counts=(16,) if quick else (16, 8, 32),
        repeats=1 if quick else _REPEATS,
        on_step=on_step,
    )
    rows = gate_rows(model_path("mix7M", quick=quick))[: 2 if quick else None]
    objective = {
        count: [_compare(features, count) for features in rows] for count in ((16,) if quick else (16, 32))
    }
    on_step("comparing objectives", 1, 1)
    ratios = [layer["ratio"] for layer in objective[16]]
    return Measured(
        figures={
            "seconds_7b_layer": statistics.median(seconds[16]),
            "objective_ratio": statistics.fmean(ratios),
        },
        peers={
            "seconds": {str(count): times for count, times in seconds.items()},
            "objective": {str(count): layers for count, layers in objective.items()},
        },
        notes={
            "seconds_7b_layer": "11008 x 4096, 16 experts",
            "objective_ratio": f"one initialization against the best of {_INITIALIZATIONS}; maximum {max(ratios):.4f}",
        },
    )


def layer_seconds(
    *, shape: tuple[int, int], counts: tuple[int, ...], repeats: int, on_step: OnStep
) -> dict[int, list[float]]:
    """Seconds of clustering synthetic gate rows of ``shape`` by expert count, interleaved over ``repeats``."""
    features = synthetic_rows(*shape)
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for repeat in range(repeats):
        for count in counts:
            start = time.perf_counter()
            balanced_clusters(features, count, seed=repeat)
            seconds[count].append(time.perf_counter() - start)
        on_step("timing one layer", repeat + 1, repeats)
    return seconds


def synthetic_rows(neurons: int, width: int, *, directions: int = 64) -> np.ndarray:
    """Rows ``[neurons, width]`` fp32 with a fifth of the variance in few directions, as in trained layers."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((neurons, directions), np.float32) @ rng.standard_normal(
        (directions, width), np.float32
    )
    return 0.5 * shared / directions**0.5 + rng.standard_normal((neurons, width), np.float32)


def gate_rows(model: str) -> list[np.ndarray]:
    """Gate rows ``[m, D]`` of every layer, fp32."""
    layers = load_dense(model).model.layers
    return [layer.mlp.gate_proj.weight.detach().float().numpy() for layer in layers]


def _compare(features: np.ndarray, count: int) -> dict[str, float]:
    """Inertia and seconds of ``balanced_clusters`` and of ``k-means-constrained``, and the ratio of inertias."""
    start = time.perf_counter()
    inertia = balanced_clusters(features, count).inertia
    middle = time.perf_counter()
    size = len(features) // count
    model = KMeansConstrained(
        count, size_min=size, size_max=size, n_init=_INITIALIZATIONS, max_iter=300, random_state=0
    )
    reference = _inertia(features, model.fit_predict(features.astype(np.float64)))
    return {
        "ratio": inertia / reference,
        "inertia": inertia,
        "reference_inertia": reference,
        "seconds": middle - start,
        "reference_seconds": time.perf_counter() - middle,
    }


def _inertia(features: np.ndarray, labels: np.ndarray) -> float:
    groups = [features[labels == label].astype(np.float64) for label in np.unique(labels)]
    return float(sum(((rows - rows.mean(axis=0)) ** 2).sum() for rows in groups))


if __name__ == "__main__":
    run_benchmark("cluster", measure)
