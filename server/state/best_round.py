"""Round whose global model has the lowest held-out loss."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from models.runtime.perplexity import LossSum


@dataclass
class BestRound:
    """Lowest held-out loss of the global model so far, and the model that has it.

    Attributes:
        loss: nats per token; infinity before the first.
        server_round: round after which the model was reached; 0: as bootstrapped.
        version: of the global model.
        copy_hash: hash of the model's experts and graph.
    """

    loss: float = math.inf
    server_round: int = 0
    version: int = 0
    copy_hash: str = ""

    @property
    def known(self) -> bool:
        """Whether any held-out loss was measured."""
        return math.isfinite(self.loss)

    def entry(self, out: str) -> dict[str, Any] | None:
        """Entry of a run's summary; None where no loss was measured.

        Args:
            out: folder of the model; empty: not written.
        """
        perplexity = LossSum(self.loss, 1).perplexity
        return {"round": self.server_round, "perplexity": perplexity, "out": out} if self.known else None

    def after(self, loss: LossSum, *, server_round: int, version: int, copy_hash: str) -> None:
        """Compare with the loss of another model; one without any token is skipped, of equal losses the first stays.

        Args:
            loss: held-out loss.
            server_round: see the attributes, as the other arguments.
            version: of the model.
            copy_hash: of the model.
        """
        if loss.tokens and loss.mean < self.loss:
            self.loss, self.server_round = loss.mean, server_round
            self.version, self.copy_hash = version, copy_hash

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON types, with null for an unknown loss."""
        return asdict(self) | {"loss": self.loss if self.known else None}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> BestRound:
        """Undo ``to_json``; nothing is known where ``value`` is empty, as in states written before there was one."""
        return cls(**value | {"loss": math.inf if value.get("loss") is None else value["loss"]})
