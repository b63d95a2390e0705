"""When a run ends before its last round: the clients' held-out loss has stopped falling."""

from __future__ import annotations

import math

from models.runtime.perplexity import LossSum


class EarlyStop:
    """Watches the held-out loss of the global model, round by round.

    Args:
        rounds: without a better loss after which the run ends; 0: never.
        delta: fall (nats per token) above which a loss is better than the best so far.
    """

    def __init__(self, *, rounds: int, delta: float) -> None:
        self._rounds, self._delta = rounds, delta
        self._best, self._without = math.inf, 0

    def after(self, loss: LossSum) -> str | None:
        """Take in a round's held-out loss over all clients; why the run should end, or None to go on.

        A round in which no client held text out says nothing either way.
        """
        if not self._rounds or not loss.tokens:
            return None
        if loss.mean < self._best - self._delta:
            self._best, self._without = loss.mean, 0
            return None
        self._without += 1
        if self._without < self._rounds:
            return None
        return (
            f"the held-out loss did not fall by more than {self._delta:g} below {self._best:.4f} nats per token "
            f"in {self._without} rounds"
        )
