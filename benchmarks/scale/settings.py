"""Sizes, runs and amounts of the scale benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Size:
    """Model size.

    Attributes:
        name: for display.
        hidden: width d.
        intermediate: FFN width m.
        layers: L.
        experts: E of each layer.
        trained: whether the weights are those of the embedded demo model; otherwise random.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    experts: int
    trained: bool = False

    @property
    def weights(self) -> int:
        """FFN weights, which clients train."""
        return 3 * self.layers * self.hidden * self.intermediate


@dataclass(frozen=True)
class Point:
    """One federation.

    Attributes:
        size: of the model.
        clients: N.
        density: kept entries / all entries of what a client ships.
        held_out: whether the cost model is fitted without it.
    """

    size: Size
    clients: int
    density: float
    held_out: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Amount of training and of measurement.

    Attributes:
        points: federations.
        rounds: server rounds, the first of which is not measured: clients read their data and the graph.
        fraction: share of the clients that is asked in a round.
        downlink_density: kept entries / all entries of the server's step.
        value_bits: bits per shipped value.
        shares: resident experts / all, of the clients in turn.
        documents: training documents of each domain of WikiMix.
        calibration_tokens: calibration tokens of the bootstrap, sampled from the model.
    """

    points: Sequence[Point]
    rounds: int = 5
    fraction: float = 0.5
    downlink_density: float = 0.01
    value_bits: int = 2
    shares: Sequence[float] = (1.0, 0.75, 0.5)
    documents: int = 100
    calibration_tokens: int = 2048


DEMO = Size("demo", 192, 1024, 4, 16, trained=True)
MEDIUM = Size("medium", 384, 2048, 4, 32)
LARGE = Size("large", 512, 2560, 5, 16)
TINY = Size("tiny", 32, 64, 2, 4)

FULL = Settings(
    points=(
        Point(DEMO, 8, 0.006),
        Point(DEMO, 16, 0.006),
        Point(DEMO, 8, 0.05),
        Point(DEMO, 32, 0.05),
        Point(MEDIUM, 16, 0.05),
        Point(DEMO, 50, 0.05, held_out=True),
        Point(LARGE, 24, 0.015, held_out=True),
    )
)
QUICK = replace(
    FULL,
    points=(Point(TINY, 2, 0.05), Point(TINY, 4, 0.05, held_out=True)),
    rounds=2,
    documents=20,
    calibration_tokens=256,
)
