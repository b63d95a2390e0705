from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from experts.graph.edit_plan import apply_plan
from experts.graph.edits import RetireExpert, SpawnExpert
from federated.updates.remap import remap_vector, remap_vectors
from models.graph.graph_state import read_graph
from models.graph.renumber import write_plan
from models.graph.unit_vectors import OTHERS, read_unit, unit_sizes
from tests.support.tiny_graphs import graph_of, with_random_gains


def test_gains_and_affinities_move_with_the_experts_that_they_come_from():
    vector = torch.tensor([9.0, 8.0, 1.0, 2.0, 3.0, -1.0, -2.0, -3.0])
    moved = remap_vector(vector, np.array([2, -1, 0, 1]), 3)
    assert moved.tolist() == [9.0, 8.0, 3.0, 0.0, 1.0, 2.0, -3.0, 0.0, -1.0, -2.0]
    assert remap_vector(vector, np.arange(3), 3) is vector


@pytest.mark.parametrize("edits", [[RetireExpert(0, 1)], [SpawnExpert(1, 2, 4), RetireExpert(0, 3)]])
def test_vectors_are_those_that_the_edited_model_has(edits):
    before = with_random_gains(graph_of())
    after, plan = copy.deepcopy(before), apply_plan(read_graph(before), edits)
    spawned = write_plan(after, plan)
    vectors = {unit: read_unit(before, unit) for unit in unit_sizes(before)} | {(1, OTHERS): torch.ones(3)}
    moved = remap_vectors(vectors, plan.origins, [4, 4])
    assert moved.pop((1, OTHERS)).tolist() == [1.0] * 3
    assert set(moved) == set(unit_sizes(after)) - spawned
    for unit, vector in moved.items():
        # Gains of pairs without an edge are cleared by the edit of the model, not by that of a vector.
        expected = read_unit(after, unit)
        where = expected != 0
        assert vector.shape == expected.shape and torch.equal(vector[where], expected[where])
