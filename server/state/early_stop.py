"""Early stopping by the clients' held-out loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from models.runtime.perplexity import LossSum


@dataclass
class EarlyStop:
    """Best held-out loss of the global model so far and the rounds since.

    Attributes:
        best: lowest loss in nats per token; infinity before the first.
        rounds_without: rounds since then without a lower loss.
    """

    best: float = math.inf
    rounds_without: int = 0

    def after(self, loss: LossSum, *, rounds: int, delta: float, target: float = 0.0) -> str | None:
        """Add a round's loss; return the reason to end the run, or None.

        Args:
            loss: held-out loss over all clients; without any token the round is skipped.
            rounds: rounds without a lower loss after which the run ends; 0: never.
            delta: decrease (nats per token) that a lower loss has to exceed.
            target: loss at which the run ends, e.g. where runs are compared by the bytes to reach it; 0: none.
        """
        if not loss.tokens:
            return None
        if loss.mean <= target:
            return (
                f"the held-out loss of {loss.mean:.4f} nats per token is at most early-stop-loss {target:g}"
            )
        if not rounds:
            return None
        if loss.mean < self.best - delta:
            self.best, self.rounds_without = loss.mean, 0
            return None
        self.rounds_without += 1
        if self.rounds_without < rounds:
            return None
        return (
            f"the held-out loss did not fall by more than {delta:g} below {self.best:.4f} nats per token "
            f"in {self.rounds_without} rounds"
        )
