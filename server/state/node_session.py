"""The server's record of one node: version held, partition, last accepted update."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class NodeSession:
    """One node over the rounds of a run.

    Attributes:
        held_version: version of the global model on its disk; 0: the bootstrapped checkpoint.
        partition: client index that it answers as; None before its first accepted reply.
        accepted_round: server round of its last update in the global model; 0: none.
    """

    held_version: int = 0
    partition: int | None = None
    accepted_round: int = 0

    def accept(self, partition: int, server_round: int) -> None:
        """Record an accepted update of client ``partition`` in ``server_round``."""
        self.partition, self.accepted_round = partition, server_round
