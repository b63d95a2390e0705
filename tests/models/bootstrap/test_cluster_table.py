from __future__ import annotations

import numpy as np
import pytest

from experts.clustering import balanced_clusters
from models.bootstrap.cluster_table import cluster_table


def test_the_cluster_table_has_a_line_per_layer_and_the_mean():
    clusters = [
        balanced_clusters(np.random.default_rng(seed).normal(size=(12, 3)), count)
        for seed, count in enumerate((3, 4))
    ]
    lines = cluster_table(clusters).splitlines()
    assert lines[0].split() == ["layer", "experts", "neurons", "within", "between", "inertia"]
    for layer, (line, each) in enumerate(zip(lines[1:3], clusters, strict=True)):
        fields = line.split()
        assert fields[:3] == [str(layer), str(len(each.members)), str(12 // len(each.members))]
        figures = [each.variance_within, each.variance_between, each.inertia]
        assert [float(field) for field in fields[3:]] == pytest.approx(figures, abs=1e-4)
    mean = (clusters[0].inertia + clusters[1].inertia) / 2
    assert float(lines[3].split()[-1]) == pytest.approx(mean, abs=1e-4) and len(lines) == 4
