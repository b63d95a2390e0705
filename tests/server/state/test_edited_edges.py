from __future__ import annotations

import numpy as np

from experts.graph.edit_plan import apply_plan
from experts.graph.edits import AddEdge, RetireExpert
from experts.graph.expert_graph import ExpertGraph
from server.state.edited_edges import EditedEdges


def test_an_edge_rests_under_its_new_number_until_the_rest_is_over():
    graph = ExpertGraph((np.eye(4, dtype=bool),))
    edited, edits = EditedEdges(), [AddEdge(0, 1, 3), RetireExpert(0, 0)]
    edited.add(graph, edits, 5)
    after = apply_plan(graph, edits).graph
    assert edited.rounds == {"0.1.3": 5}
    assert edited.resting(after, 6, 2) == {(0, 0, 2)}
    gone = apply_plan(after, [RetireExpert(0, 2)]).graph
    assert edited.resting(gone, 6, 2) == set() and edited.rounds
    assert edited.resting(after, 7, 2) == set() and edited.rounds == {}
    edited.add(graph, edits, 8)
    assert edited.resting(after, 8, 0) == set()
