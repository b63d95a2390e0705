"""Privacy budget of a run: epsilon spent by its rounds, and the end of the run before it exceeds a limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from configs.errors import UserError
from configs.run_views import Privacy
from server.privacy.accountant import spent_epsilon


class PrivacySpent(NamedTuple):
    """Guarantee of the released models; both None without one.

    Attributes:
        epsilon: of the client with the most updates in the model.
        delta: at which epsilon holds.
    """

    epsilon: float | None = None
    delta: float | None = None


@dataclass(frozen=True)
class PrivacyBudget:
    """Accounting of a run.

    A round in which a client had no update changes nothing for it: its loss is that of the rounds in which it had one.

    Attributes:
        keys: keys of differential privacy.
    """

    keys: Privacy

    def spent(self, updates: Mapping[int, int]) -> PrivacySpent:
        """Epsilon and delta so far.

        Args:
            updates: number of rounds with an update of each client, by client index.
        """
        epsilon = self._epsilon(max(updates.values(), default=0)) if self.keys.on else math.inf
        return PrivacySpent(epsilon, self.keys.dp_delta) if math.isfinite(epsilon) else PrivacySpent()

    def exhausted(self, updates: Mapping[int, int]) -> str | None:
        """Reason to end the run before another round; None where it stays within ``dp-epsilon``."""
        if not self._exceeded(max(updates.values(), default=0) + 1):
            return None
        return (
            f"another round would exceed dp-epsilon {self.keys.dp_epsilon:g} at delta {self.keys.dp_delta:g}"
        )

    def check(self) -> None:
        """Check that there is an accountant, and room for one round at least.

        Raises:
            UserError: there is none, or ``dp-epsilon`` is below what one round costs.
        """
        if self.keys.on and self._exceeded(1):
            raise UserError(
                f"expected dp-epsilon of at least {self._epsilon(1):.4g}, which one round costs at "
                f"dp-noise-multiplier {self.keys.dp_noise_multiplier:g}, got {self.keys.dp_epsilon:g}; raise either"
            )

    def _exceeded(self, rounds: int) -> bool:
        epsilon = self._epsilon(rounds)
        return bool(self.keys.dp_epsilon) and epsilon > self.keys.dp_epsilon

    def _epsilon(self, rounds: int) -> float:
        keys = self.keys
        return spent_epsilon(
            rounds,
            noise_multiplier=keys.dp_noise_multiplier,
            usage_noise=keys.dp_usage_noise,
            delta=keys.dp_delta,
        )
