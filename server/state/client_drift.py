"""Change detection on one client's held-out loss and on its distribution of tokens over experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import rel_entr

from configs.run_views import DriftDetection
from models.runtime.perplexity import LossSum

DECAY = 0.5  # weight of earlier rounds in all moving averages
TOLERANCE = 0.01  # nats per token and round that the loss may exceed its moving average by
SURGE = 5.0  # multiple of the usual divergence of routing that a drift exceeds, too


@dataclass(frozen=True)
class Observation:
    """Report of one client in one round.

    Attributes:
        partition: index of the client.
        loss: of the received global model on its held-out text.
        visits: per layer float64 ``[E]``, visits of each routed expert; NaN for experts that the client did not hold.
    """

    partition: int
    loss: LossSum
    visits: Sequence[np.ndarray]


@dataclass
class ClientDrift:
    """Statistics of one client; they stay as they are in rounds without a report of it.

    The loss is tested with the one-sided cumulative sum of Page (1954, doi:10.1093/biomet/41.1-2.100). Its reference is
    the moving average of the loss in place of a fixed mean, since training lowers the loss: a jump by J nats adds J in
    its first round and at most J / (1 - DECAY) in all, and the sum falls again while the loss does. Training itself
    changes the routing, faster with a larger learning rate: the divergence of a round counts as drift where it exceeds
    ``SURGE`` times the usual one, too.

    Attributes:
        seen: last round with a report.
        expected: moving average of the loss, nats per token; None before the first.
        excess: cumulative sum of the loss above ``expected`` and ``TOLERANCE``, at least 0, nats per token.
        divergence: Jensen-Shannon divergence between the visits of the last round and their moving average, mean over
            layers, bits (0 to 1); None where there is nothing to compare.
        usual: moving average of the divergences of earlier rounds, bits; None before the first.
        shares: moving average of the shares of a layer's visits, per layer ``[E]``; NaN for experts never held.
        drifted: whether the last report had a loss or a routing that counts as drift.
    """

    seen: int = 0
    expected: float | None = None
    excess: float = 0.0
    divergence: float | None = None
    usual: float | None = None
    shares: list[np.ndarray] = field(default_factory=list)
    drifted: bool = False

    def add(self, observation: Observation, server_round: int, keys: DriftDetection) -> list[float]:
        """Add a report; return the divergence of each layer in bits, NaN where there is nothing to compare."""
        self.seen = server_round
        if observation.loss.tokens:
            self._add_loss(observation.loss.mean)
        layers = self._add_visits(observation.visits)
        surged = self._add_divergence([each for each in layers if not math.isnan(each)], keys.drift_routing)
        self.drifted = surged or exceeds(self.excess, keys.drift_loss)
        return layers

    def restart(self) -> None:
        """Forget all averages and the alarm: the next report is the first."""
        self.expected, self.excess, self.divergence, self.usual = None, 0.0, None, None
        self.shares, self.drifted = [], False

    def to_json(self) -> dict[str, Any]:
        """Everything but ``shares``, as JSON types."""
        return {name: value for name, value in vars(self).items() if name != "shares"}

    def _add_loss(self, loss: float) -> None:
        if self.expected is None:
            self.expected = loss
            return
        self.excess = max(0.0, self.excess + loss - self.expected - TOLERANCE)
        self.expected = DECAY * self.expected + (1 - DECAY) * loss

    def _add_divergence(self, layers: Sequence[float], threshold: float) -> bool:
        """Update ``divergence`` and ``usual``; return whether the routing of the round counts as drift."""
        self.divergence = sum(layers) / len(layers) if layers else None
        if self.divergence is None:
            return False
        usual = self.usual
        self.usual = self.divergence if usual is None else DECAY * usual + (1 - DECAY) * self.divergence
        return usual is not None and exceeds(self.divergence, threshold) and self.divergence > SURGE * usual

    def _add_visits(self, visits: Sequence[np.ndarray]) -> list[float]:
        """Update ``shares``; a layer whose number of experts has changed starts from its visits of this round."""
        if len(self.shares) != len(visits):
            self.shares = [np.empty(0)] * len(visits)
        divergences = []
        for layer, counts_E in enumerate(visits):
            total = np.nansum(counts_E)
            share_E, past_E = counts_E / total if total else counts_E * np.nan, self.shares[layer]
            if len(past_E) != len(share_E):
                past_E = np.full(len(share_E), np.nan)
            divergences.append(jensen_shannon(share_E, past_E))
            mixed_E = DECAY * past_E + (1 - DECAY) * share_E
            self.shares[layer] = np.where(
                np.isnan(share_E), past_E, np.where(np.isnan(past_E), share_E, mixed_E)
            )
        return divergences


def exceeds(value: float | None, threshold: float) -> bool:
    """Whether a statistic exceeds its threshold; a threshold of 0 is off."""
    return threshold > 0 and value is not None and value > threshold


def jensen_shannon(p_E: np.ndarray, q_E: np.ndarray) -> float:
    """Jensen-Shannon divergence in bits of two distributions over the experts known in both.

    Args:
        p_E: float64 ``[E]``, at least 0, any sum; NaN where unknown.
        q_E: as ``p_E``.

    Returns:
        0 to 1; NaN where the known experts of one of them have no mass. (``scipy.spatial.distance.jensenshannon`` is
        NaN for some equal distributions, whose divergence it rounds below 0.)
    """
    known = ~(np.isnan(p_E) | np.isnan(q_E))
    p, q = p_E[known], q_E[known]
    if not p.sum() > 0 or not q.sum() > 0:
        return math.nan
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    bits = (rel_entr(p, middle).sum() + rel_entr(q, middle).sum()) / 2 / math.log(2)
    return float(min(max(bits, 0.0), 1.0))
