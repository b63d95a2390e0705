"""Bounds of what a client reports: the accepted fields of a reply and their ranges, with room for honest replies.

Within these bounds every sum over the clients of a round is finite.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from federated.protocol.messages import Reply
from federated.updates.update import RefusedUpdate

LARGEST_COUNT = 2**40  # blocks or tokens of one client in one round
LARGEST_LOSS = 1e4  # nats per token
LARGEST_SECONDS = 1e7
LARGEST_PARTITION = 2**31 - 1


@dataclass(frozen=True)
class Range:
    """Accepted values of a number: from ``least`` to ``most``, with ``whole`` integers only."""

    least: float
    most: float
    whole: bool = False

    def check(self, name: str, value: float) -> None:
        """Refuse a value out of range, NaN included; RefusedUpdate names the number."""
        if not self.least <= value <= self.most or (self.whole and value != int(value)):
            kind = "a whole number" if self.whole else "a finite number"
            raise RefusedUpdate(
                f"expected {name} to be {kind} from {self.least:g} to {self._most}, got {value}"
            )

    @property
    def _most(self) -> str:
        return str(int(self.most)) if self.whole else f"{self.most:g}"


_COUNT, _LOSS_SUM = Range(0, LARGEST_COUNT, whole=True), Range(0, LARGEST_LOSS * LARGEST_COUNT)
# Accepted numbers of a reply by name; a loss sum has the tokens of the same prefix beside it.
NUMBERS: dict[str, Range] = {
    "examples": Range(1, LARGEST_COUNT, whole=True),
    "train-tokens": _COUNT,
    "train-loss": Range(0, LARGEST_LOSS),
    "density": Range(0, 1),
    "start-seconds": Range(0, LARGEST_SECONDS),
    "valid-nll": _LOSS_SUM,
    "valid-tokens": _COUNT,
    "personal-nll": _LOSS_SUM,
    "personal-tokens": _COUNT,
}
# Names that clients get from their data: no spaces, control characters or markup of consoles.
NAME = re.compile(r"[\w.+-]{1,96}")


def check_reply(reply: Reply, *, num_experts: int) -> None:
    """Refuse a reply with a field out of its range.

    Args:
        reply: reply as read.
        num_experts: most experts of a layer, the largest budget.

    Raises:
        RefusedUpdate: names the field, the accepted range and the value.
    """
    if not NAME.fullmatch(reply.name):
        shown = reply.name[:32]
        raise RefusedUpdate(
            f"expected a name of 1 to 96 letters, digits and '_', '.', '+', '-', got {ascii(shown)}"
        )
    Range(0, LARGEST_PARTITION, whole=True).check("partition", reply.partition)
    Range(0, num_experts, whole=True).check("budget", reply.budget)
    check_numbers(reply.numbers)


def check_numbers(numbers: Mapping[str, float]) -> None:
    """Refuse an unknown number, one out of its range, or a loss above ``LARGEST_LOSS`` per token.

    Raises:
        RefusedUpdate: names the number.
    """
    for name, value in numbers.items():
        if name not in NUMBERS:
            raise RefusedUpdate(f"expected numbers among {', '.join(NUMBERS)}, got {ascii(name[:32])}")
        NUMBERS[name].check(name, value)
    for name in ("valid", "personal"):
        nll, tokens = numbers.get(f"{name}-nll", 0.0), numbers.get(f"{name}-tokens", 0.0)
        if nll > LARGEST_LOSS * tokens:
            raise RefusedUpdate(
                f"expected {name}-nll of at most {LARGEST_LOSS:g} per token, got {nll:g} of {tokens:g} tokens"
            )
