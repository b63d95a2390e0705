"""The server's record of one node: version held, partition, last accepted update."""

from __future__ import annotations

from dataclasses import dataclass

_LONGEST_REST = 6  # a power of two, less one, in rounds


@dataclass
class NodeSession:
    """One node over the rounds of a run.

    Attributes:
        held_version: version of the global model on its disk; 0: the bootstrapped checkpoint.
        partition: client index that it answers as; None before its first accepted reply.
        accepted_round: server round of its last update in the global model; 0: none.
        silence: requests in a row that it did not answer.
        rests_until: round from which it is asked again.
        asked_round: server round in which it was last asked to train; 0: never.
        examples: training blocks that its last accepted reply claimed; 0: not known.
    """

    held_version: int = 0
    partition: int | None = None
    accepted_round: int = 0
    silence: int = 0
    rests_until: int = 0
    asked_round: int = 0
    examples: float = 0.0

    def accept(self, partition: int, server_round: int, *, examples: float = 0.0) -> None:
        """Record an accepted update of client ``partition`` in ``server_round``, which claims ``examples`` blocks."""
        self.partition, self.accepted_round, self.examples = partition, server_round, examples

    def heard(self, answered: bool, server_round: int) -> None:
        """Record whether the node answered a request of ``server_round``.

        After the second request in a row without an answer it rests for one round, then for 3, 7, up to 63: each
        request to a dead node delays the round until the deadline.
        """
        self.silence = 0 if answered else self.silence + 1
        rest = 2 ** min(self.silence - 1, _LONGEST_REST) - 1 if self.silence else 0
        self.rests_until = server_round + (rest + 1 if rest else 0)
