"""Serializable state of a run: everything that the rounds accumulate apart from the global model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from safetensors.numpy import load, save

from server.state.best_round import BestRound
from server.state.drift import Drift
from server.state.early_stop import EarlyStop
from server.state.edited_edges import EditedEdges
from server.state.node_session import NodeSession
from server.state.usage_average import UsageAverage

_FACTS = "facts"  # tensor that holds everything but arrays, as JSON in UTF-8


@dataclass
class FederationState:
    """State after the last completed aggregation.

    Attributes:
        server_round: rounds whose aggregated change is in the global model.
        model_version: version of the global model.
        graph_version: version of its graph.
        stopped: reason why the run ended before its last planned round; None: it did not.
        usage: moving average of expert usage.
        early_stop: rounds without a lower held-out loss.
        best: round whose model has the lowest held-out loss.
        sessions: by node id.
        drift: detection of a change in the clients' text.
        edited: rounds of the last edits of edges.
        departed: round of the last accepted update by client index, of clients whose node is not connected any more.
        updates: number of accepted updates by client index.
    """

    server_round: int = 0
    model_version: int = 0
    graph_version: int = 0
    stopped: str | None = None
    usage: UsageAverage = field(default_factory=UsageAverage)
    early_stop: EarlyStop = field(default_factory=EarlyStop)
    best: BestRound = field(default_factory=BestRound)
    sessions: dict[int, NodeSession] = field(default_factory=dict)
    drift: Drift = field(default_factory=Drift)
    edited: EditedEdges = field(default_factory=EditedEdges)
    departed: dict[int, int] = field(default_factory=dict)
    updates: dict[int, int] = field(default_factory=dict)

    def connect(self, nodes: Sequence[int]) -> None:
        """Keep the sessions of these nodes, and open one for each that is new.

        A restarted node has another id, and says only in its reply which client it is. It is taken to hold the present
        model, since one that does not asks for what it lacks.
        """
        for node in set(self.sessions) - set(nodes):
            session = self.sessions.pop(node)
            if session.partition is not None:
                self.departed[session.partition] = session.accepted_round
        self.sessions = {
            node: self.sessions.get(node) or NodeSession(held_version=self.model_version) for node in nodes
        }

    def accept(self, node: int, partition: int, *, examples: float = 0.0) -> None:
        """Record an accepted update of client ``partition`` in the present round, which claims ``examples`` blocks."""
        self.sessions[node].accept(partition, self.server_round, examples=examples)
        self.departed.pop(partition, None)
        self.updates[partition] = self.updates.get(partition, 0) + 1

    def partitions(self) -> dict[int, int]:
        """Client index by node id, for the nodes with an accepted reply."""
        return {node: each.partition for node, each in self.sessions.items() if each.partition is not None}

    def to_bytes(self) -> bytes:
        """Serialize as a safetensors file: usage counts and averages of routing as tensors, everything else as JSON."""
        best = self.early_stop.best
        facts = {
            "server_round": self.server_round,
            "model_version": self.model_version,
            "graph_version": self.graph_version,
            "stopped": self.stopped,
            "early_stop": asdict(self.early_stop) | {"best": best if math.isfinite(best) else None},
            "best": self.best.to_json(),
            "drift": self.drift.to_json(),
            "edited": self.edited.rounds,
            "sessions": {str(node): asdict(session) for node, session in self.sessions.items()},
            "departed": {str(partition): last for partition, last in self.departed.items()},
            "updates": {str(partition): count for partition, count in self.updates.items()},
        }
        text = np.frombuffer(json.dumps(facts, allow_nan=False).encode(), dtype=np.uint8)
        usage = {f"usage.{layer}": np.ascontiguousarray(each) for layer, each in enumerate(self.usage.counts)}
        return save({_FACTS: text, **usage, **self.drift.tensors()})

    @classmethod
    def from_bytes(cls, data: bytes) -> FederationState:
        """Undo ``to_bytes``, bit for bit."""
        tensors = load(data)
        facts = json.loads(tensors.pop(_FACTS).tobytes())
        best = facts["early_stop"].pop("best")
        layers = sum(name.startswith("usage.") for name in tensors)
        return cls(
            server_round=facts["server_round"],
            model_version=facts["model_version"],
            graph_version=facts["graph_version"],
            stopped=facts["stopped"],
            usage=UsageAverage([tensors[f"usage.{layer}"] for layer in range(layers)]),
            early_stop=EarlyStop(math.inf if best is None else best, **facts["early_stop"]),
            best=BestRound.from_json(facts.get("best", {})),
            drift=Drift.from_parts(facts.get("drift", {}), tensors),
            edited=EditedEdges(facts.get("edited", {})),
            sessions={int(node): NodeSession(**session) for node, session in facts["sessions"].items()},
            departed={int(partition): last for partition, last in facts.get("departed", {}).items()},
            updates={int(partition): count for partition, count in facts.get("updates", {}).items()},
        )
