from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from experts.clustering import balanced_clusters
from experts.flow_kmeans import balanced_assignment, flow_labels


@given(st.sampled_from([(6, 2), (6, 3), (4, 4), (6, 1)]), st.integers(0, 99), st.booleans())
@settings(deadline=None, max_examples=40)
def test_a_balanced_assignment_costs_the_least_of_all(shape, seed, ties):
    neurons, experts = shape
    costs = np.random.default_rng(seed).normal(size=shape)
    costs = np.round(costs) if ties else costs
    labels = balanced_assignment(costs)
    slots, columns = linear_sum_assignment(costs.repeat(neurons // experts, axis=1))
    assert np.bincount(labels, minlength=experts).tolist() == [neurons // experts] * experts
    found = costs[np.arange(neurons), labels].sum()
    assert found == pytest.approx(costs.repeat(neurons // experts, axis=1)[slots, columns].sum(), abs=1e-2)


def test_labels_are_the_clusters_of_the_default_clustering():
    features = np.random.default_rng(0).normal(size=(40, 3))
    labels = flow_labels(features, 5, seed=2, restarts=1, max_iterations=30)
    assert labels.shape == (40,) and np.bincount(labels).tolist() == [8] * 5
    members = balanced_clusters(features, 5, seed=2).members
    assert [np.flatnonzero(labels == expert).tolist() for expert in range(5)] == members.tolist()
