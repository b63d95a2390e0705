"""Record of a run over its rounds: what they contribute to the summary and to the logs of later rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from configs.output import finite
from federated.protocol.messages import Reply

TRAFFIC = ("bytes_up", "bytes_down", "bytes_up_dense", "bytes_down_dense")


@dataclass
class ClientFigures:
    """One client in the summary; None where a figure is not known.

    Attributes:
        name: of its first valid reply.
        budget: experts per layer that it holds.
        perplexity_before: of the global model on its held-out text, before its first accepted update.
        perplexity_after: of the final global model.
        perplexity_after_personal: of its own model, in the last round that reported one.
        graph_hash: hash of the graph that it held.
        drift_rounds: rounds in whose report its text had drifted.
    """

    name: str
    budget: int | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    perplexity_after_personal: float | None = None
    graph_hash: str | None = None
    drift_rounds: list[int] = field(default_factory=list)


@dataclass
class NodeRecord:
    """One Flower node of a run.

    Attributes:
        name: name of its client; empty before its first valid reply.
        partition: index of its client; None before its first valid reply.
        used: whether an update of it was accepted.
        refused: reason of the last refusal.
    """

    name: str = ""
    partition: int | None = None
    used: bool = False
    refused: str | None = None


@dataclass
class RunHistory:
    """Counts over the completed rounds, clients and nodes.

    Attributes:
        rounds: completed rounds.
        edits: graph edits.
        drift_rounds: rounds after which the federation had drifted.
        traffic: bytes of each kind of ``TRAFFIC``.
        clients: by client index.
        nodes: by Flower node id.
        epsilon: of client-level differential privacy of the model; None without a guarantee.
        delta: at which epsilon holds.
    """

    rounds: int = 0
    edits: int = 0
    drift_rounds: list[int] = field(default_factory=list)
    traffic: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TRAFFIC, 0))
    clients: dict[int, ClientFigures] = field(default_factory=dict)
    nodes: dict[int, NodeRecord] = field(default_factory=dict)
    epsilon: float | None = None
    delta: float | None = None

    def client(self, node: int, reply: Reply, *, num_experts: int) -> ClientFigures:
        """Record the sender of a valid reply and return the figures of its client, to be changed in place.

        Args:
            node: Flower node id of the sender.
            reply: reply as read.
            num_experts: experts per layer of a client that holds all.
        """
        record = self._node(node)
        record.name, record.partition = reply.name, reply.partition
        fresh = ClientFigures(reply.name, reply.budget or num_experts, graph_hash=reply.graph_hash)
        return self.clients.setdefault(reply.partition, fresh)

    def accepted(self, node: int) -> None:
        """Record that an update of a node was accepted."""
        self._node(node).used = True

    def refused(self, node: int, reason: str) -> None:
        """Record why an update of a node was refused."""
        self._node(node).refused = reason

    def name_of(self, node: int) -> str:
        """Name of a node's client; ``node-ID`` before its first valid reply."""
        return (node in self.nodes and self.nodes[node].name) or f"node-{node}"

    def in_order(self, nodes: Iterable[int]) -> list[int]:
        """Sort nodes by the name of their client, so that a client keeps its position from round to round."""

        def position(node: int) -> tuple[str, int]:
            named = node in self.nodes and self.nodes[node].name
            return named or f"~{node}", node

        return sorted(nodes, key=position)

    def client_summaries(self) -> list[dict[str, Any]]:
        """Clients in order of their index, then the nodes without any valid reply; ``refused`` where none was used."""
        unused = {node: each for node, each in sorted(self.nodes.items()) if each.refused and not each.used}
        used = {each.partition for each in self.nodes.values() if each.used}
        reasons = {each.partition: each.refused for each in unused.values() if each.partition not in used}
        known = [
            asdict(self.clients[index]) | {"refused": reasons.get(index)} for index in sorted(self.clients)
        ]
        return known + [
            asdict(ClientFigures(self.name_of(node))) | {"refused": each.refused}
            for node, each in unused.items()
            if each.partition is None
        ]

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON types, with null for numbers that are not finite."""
        return finite(asdict(self))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunHistory:
        """Undo ``to_json``; reads the first format of saved runs, too, which had a mapping per attribute of a node."""
        value = _from_first_format(value) if "_clients" in value else value
        return cls(
            rounds=value["rounds"],
            edits=value["edits"],
            drift_rounds=list(value.get("drift_rounds", [])),
            traffic=dict(value["traffic"]),
            clients={int(index): ClientFigures(**each) for index, each in value["clients"].items()},
            nodes={int(node): NodeRecord(**each) for node, each in value["nodes"].items()},
            epsilon=value.get("epsilon"),
            delta=value.get("delta"),
        )

    def _node(self, node: int) -> NodeRecord:
        return self.nodes.setdefault(node, NodeRecord())


def _from_first_format(value: Mapping[str, Any]) -> dict[str, Any]:
    names, partitions, unused = value["_names"], value["_partitions"], value["_unused"]
    used = {str(node) for node in value["_used"]}
    return {
        "rounds": value["_rounds"],
        "edits": value["_edits"],
        "traffic": value["_bytes"],
        "clients": value["_clients"],
        "nodes": {
            node: asdict(
                NodeRecord(names.get(node, ""), partitions.get(node), node in used, unused.get(node))
            )
            for node in {*names, *unused, *used}
        },
    }
