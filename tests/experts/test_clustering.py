from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from k_means_constrained import KMeansConstrained

from configs.choices import Clustering
from configs.errors import UserError
from experts.clustering import (
    balanced_clusters,
    check_clustering,
    check_expert_count,
    random_clusters,
    timed_clusters,
    valid_expert_counts,
)


def blobs(count: int, size: int, *, seed: int = 0) -> np.ndarray:
    """``count`` clouds of ``size`` points each, far apart, in shuffled order."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(0, 20, (count, 3))
    points = np.repeat(centers, size, axis=0) + rng.normal(0, 1, (count * size, 3))
    return rng.permutation(points)


def inertia_of(features: np.ndarray, members: np.ndarray) -> float:
    """Sum of squared distances to the centers, point by point."""
    total = 0.0
    for rows in members:
        center = sum(features[row] for row in rows) / len(rows)
        total += sum(float(np.dot(features[row] - center, features[row] - center)) for row in rows)
    return total


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(12, 1), (12, 3), (12, 4), (12, 12), (30, 5), (1, 1), (7, 7)]),
    st.integers(0, 99),
    st.booleans(),
    st.sampled_from(list(Clustering)),
)
def test_every_neuron_is_in_exactly_one_expert_and_all_experts_are_equal(shape, seed, constant, clustering):
    neurons, experts = shape
    features = np.random.default_rng(seed).normal(size=(neurons, 2)).astype(np.float32) * (not constant)
    clusters = balanced_clusters(features, experts, clustering=clustering, seed=seed)
    assert clusters.members.shape == (experts, neurons // experts)
    assert sorted(clusters.members.flatten().tolist()) == list(range(neurons))
    assert (np.diff(clusters.members, axis=1) > 0).all()
    assert clusters.sizes == [neurons // experts] * experts


def test_the_figures_are_those_of_a_point_by_point_computation():
    features = blobs(4, 6, seed=1)
    clusters = balanced_clusters(features, 4)
    inertia = inertia_of(features, clusters.members)
    everything = inertia_of(features, np.arange(len(features))[None])
    assert clusters.inertia == pytest.approx(inertia, rel=1e-9)
    assert clusters.variance_within == pytest.approx(inertia / 24, rel=1e-9)
    assert clusters.variance_between == pytest.approx((everything - inertia) / 24, rel=1e-9)


def test_clouds_are_found_and_beat_experts_drawn_at_random():
    features = blobs(4, 8)
    found = balanced_clusters(features, 4, restarts=3)
    assert found.inertia < 4 * 8 * 3 * 3
    assert found.inertia < 0.2 * inertia_of(features, random_clusters(32, 4))


def test_one_expert_holds_all_and_an_expert_each_costs_nothing():
    features = np.random.default_rng(0).normal(size=(6, 2))
    assert balanced_clusters(features, 1).members.tolist() == [[0, 1, 2, 3, 4, 5]]
    alone = balanced_clusters(features, 6)
    assert alone.sizes == [1] * 6 and alone.inertia == 0 == alone.variance_within


@pytest.mark.parametrize("neurons, width, experts", [(512, 8, 16), (256, 100, 16)])
def test_the_inertia_is_near_that_of_the_reference_implementation(neurons, width, experts):
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(neurons, 6)) @ rng.normal(size=(6, width))).astype(np.float32)
    features += 0.5 * rng.normal(size=features.shape)
    size = neurons // experts
    reference = KMeansConstrained(experts, size_min=size, size_max=size, n_init=3, random_state=0)
    labels = reference.fit_predict(features.astype(np.float64))
    members = np.stack([np.flatnonzero(labels == expert) for expert in range(experts)])
    found = balanced_clusters(features, experts, restarts=3).inertia
    assert found <= 1.02 * inertia_of(features.astype(np.float64), members)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_the_package_is_run_as_it_is_on_features_of_any_scale(scale):
    features = np.random.default_rng(0).normal(size=(64, 5))
    centered = features - features.mean(axis=0)
    distance = np.mean([np.linalg.norm(row) for row in centered])
    reference = KMeansConstrained(8, size_min=8, size_max=8, random_state=3)
    labels = reference.fit_predict(centered * 10 / distance)
    expected = [np.flatnonzero(labels == expert).tolist() for expert in range(8)]
    found = balanced_clusters(features * scale, 8, clustering="k-means-constrained", seed=3)
    assert found.members.tolist() == expected
    assert found.inertia == pytest.approx(inertia_of(features * scale, found.members), rel=1e-9)


def test_clusters_of_the_package_that_are_not_balanced_are_refused(monkeypatch):
    monkeypatch.setattr(KMeansConstrained, "fit_predict", lambda self, rows: np.array([0, 0, 0, 1]))
    with pytest.raises(RuntimeError, match=r"\[3, 1\] neurons, not of 2"):
        balanced_clusters(np.arange(8.0).reshape(4, 2), 2, clustering="k-means-constrained")


def test_an_unknown_clustering_and_a_package_that_is_missing_are_refused(monkeypatch):
    with pytest.raises(UserError, match="flow or k-means-constrained, got 'k-means'"):
        balanced_clusters(np.zeros((4, 2)), 2, clustering="k-means")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_clustering("flow")
    with pytest.raises(UserError, match="k-means-constrained.*install.sh clustering$"):
        check_clustering("k-means-constrained")


def test_more_restarts_are_never_worse():
    features = np.random.default_rng(3).normal(size=(64, 5))
    one, five = (balanced_clusters(features, 8, restarts=count).inertia for count in (1, 5))
    assert five <= one


def test_the_scale_and_the_place_of_the_features_do_not_matter():
    features = blobs(4, 8)
    for moved in (features * 1e-4, features + 50):
        same, found = (balanced_clusters(rows, 4, restarts=3).members for rows in (moved, features))
        assert {tuple(rows) for rows in same.tolist()} == {tuple(rows) for rows in found.tolist()}


def test_the_seed_decides():
    features = np.random.default_rng(0).normal(size=(48, 4))
    one, same, other = (balanced_clusters(features, 6, seed=seed).members for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    drawn, again, different = (random_clusters(48, 6, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(drawn, again) and not np.array_equal(drawn, different)
    assert drawn.shape == (6, 8) and sorted(drawn.flatten().tolist()) == list(range(48))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("clustering", Clustering)
def test_features_that_are_not_finite_are_refused(bad, clustering):
    features = np.zeros((4, 2))
    features[2, 1] = bad
    with pytest.raises(UserError, match="finite"):
        balanced_clusters(features, 2, clustering=clustering)


@given(st.integers(1, 400))
def test_valid_counts_are_the_divisors(neurons):
    assert valid_expert_counts(neurons) == [n for n in range(1, neurons + 1) if neurons / n == neurons // n]


@pytest.mark.parametrize(
    "neurons, asked, near",
    [(64, 5, "2, 4, 8"), (172, 5, "1, 2, 4"), (64, 0, "1, 2, 4"), (64, -3, "1, 2, 4"), (64, 100, "64")],
)
def test_an_expert_count_that_does_not_divide_is_answered_with_the_nearest_that_do(neurons, asked, near):
    for refuse in (
        lambda: check_expert_count(neurons, asked),
        lambda: random_clusters(neurons, asked),
        lambda: balanced_clusters(np.zeros((neurons, 1)), asked),
    ):
        with pytest.raises(UserError) as error:
            refuse()
        listed = {int(word) for word in str(error.value).rpartition(":")[2].split(",")}
        assert {int(word) for word in near.split(",")} <= listed
        assert all(neurons % count == 0 for count in listed) and "\n" not in str(error.value)


def test_the_nearest_counts_are_chosen_by_distance():
    with pytest.raises(UserError, match="64, 128, 256, 512$"):
        check_expert_count(1024, 500)
    check_expert_count(1024, 512)


def test_timed_clusters_are_the_clusters_and_a_time():
    features = blobs(3, 4)
    clusters, seconds = timed_clusters(features, 3, 5)
    assert np.array_equal(clusters.members, balanced_clusters(features, 3, seed=5).members)
    assert 0 < seconds < 60
    other, _ = timed_clusters(features, 3, 5, "k-means-constrained")
    reference = balanced_clusters(features, 3, seed=5, clustering="k-means-constrained")
    assert np.array_equal(other.members, reference.members)
