"""Detection of a change in the clients' text, per client and for the federation, from losses and routing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from configs.run_views import DriftDetection
from federated.aggregation.caps import untrusted
from server.state.client_drift import ClientDrift, Observation

RECENT = 3  # rounds since its last report in which a client counts
QUORUM = 0.25  # share of the recent clients that makes the drift one of the federation
LEAST = 2  # clients, where there are as many
_PREFIX = "drift"  # of the names of tensors


@dataclass
class Drift:
    """Detectors of all clients and their decision after the last round.

    The federation has drifted where a quarter of the clients of the latest three rounds have, and at least two of
    them where there are two. A mean over clients would let one that reports a false loss decide.

    Attributes:
        clients: by client index.
        overall: whether the federation has drifted; holds until enough losses have fallen again, or ``restart``.
        drifted: indices of the clients of the latest rounds that have drifted, sorted.
        layers: divergence of routing of each layer in the last round, bits (0 to 1), mean over clients; of three
            clients or more without the largest fifth, at least one; 0 where there is nothing to compare.
    """

    clients: dict[int, ClientDrift] = field(default_factory=dict)
    overall: bool = False
    drifted: list[int] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)

    def add(self, observations: Sequence[Observation], server_round: int, keys: DriftDetection) -> None:
        """Add the reports of a round and decide; clients without one keep their statistics.

        Args:
            observations: at most one per client.
            server_round: number of the round, from 1.
            keys: thresholds.
        """
        divergences = []
        for each in observations:
            client = self.clients.setdefault(each.partition, ClientDrift())
            divergences.append(client.add(each, server_round, keys))
        self.layers = [_bounded_mean(layer) for layer in zip(*filter(None, divergences), strict=True)]
        recent = {index for index, each in self.clients.items() if each.seen > server_round - RECENT}
        self.drifted = sorted(index for index in recent if self.clients[index].drifted)
        needed = max(min(LEAST, len(recent)), math.ceil(QUORUM * len(recent)))
        self.overall = 0 < needed <= len(self.drifted)

    def restart(self) -> None:
        """Withdraw all alarms and forget all averages, e.g. after the model was changed to answer a drift."""
        for client in self.clients.values():
            client.restart()
        self.overall, self.drifted, self.layers = False, [], []

    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays of ``tensors``, as JSON types."""
        clients = {str(index): each.to_json() for index, each in self.clients.items()}
        return {"clients": clients} | {name: getattr(self, name) for name in ("overall", "drifted", "layers")}

    def tensors(self) -> dict[str, np.ndarray]:
        """Moving averages of routing by name."""
        return {
            f"{_PREFIX}.{index}.{layer}": np.ascontiguousarray(shares)
            for index, each in self.clients.items()
            for layer, shares in enumerate(each.shares)
        }

    @classmethod
    def from_parts(cls, facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Drift:
        """Undo ``to_json`` and ``tensors``, bit for bit; without facts (of states stored before): no client yet."""
        clients = {
            int(index): ClientDrift(**each, shares=_layers(tensors, int(index)))
            for index, each in facts.get("clients", {}).items()
        }
        return cls(clients, **{name: value for name, value in facts.items() if name != "clients"})


def _layers(tensors: Mapping[str, np.ndarray], index: int) -> list[np.ndarray]:
    prefix = f"{_PREFIX}.{index}."
    count = sum(name.startswith(prefix) for name in tensors)
    return [tensors[f"{prefix}{layer}"] for layer in range(count)]


def _bounded_mean(values: Sequence[float]) -> float:
    known = sorted(each for each in values if not math.isnan(each))
    kept = known[: len(known) - untrusted(len(known))]
    return sum(kept) / len(kept) if kept else 0.0
