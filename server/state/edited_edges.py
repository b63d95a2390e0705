"""Rounds of the last edit of each edge, so that an edge is not added and removed in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from experts.graph.edits import AddEdge, Edit, RemoveEdge
from experts.graph.expert_graph import ExpertGraph


@dataclass
class EditedEdges:
    """Edges that were edited.

    Attributes:
        rounds: ``"layer.p.q"`` with the identities of the experts, which outlast renumbering -> round of the last edit.
    """

    rounds: dict[str, int] = field(default_factory=dict)

    def add(self, graph: ExpertGraph, edits: Sequence[Edit], server_round: int) -> None:
        """Record the edits of edges in a plan, in numbers of ``graph``, before it is applied."""
        for edit in edits:
            if isinstance(edit, AddEdge | RemoveEdge):
                ids = graph.ids_per_layer[edit.layer]
                self.rounds[f"{edit.layer}.{ids[edit.p]}.{ids[edit.q]}"] = server_round

    def resting(self, graph: ExpertGraph, server_round: int, rest: int) -> set[tuple[int, int, int]]:
        """Edges ``(layer, p, q)`` of ``graph`` that were edited in the latest ``rest`` rounds; drops older ones."""
        self.rounds = {edge: last for edge, last in self.rounds.items() if last > server_round - rest}
        known = graph.ids_per_layer
        edges = (tuple(map(int, edge.split("."))) for edge in self.rounds)
        return {
            (layer, known[layer].index(p), known[layer].index(q))
            for layer, p, q in edges
            if p in known[layer] and q in known[layer]
        }
