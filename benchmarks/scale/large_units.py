"""CPU seconds of the server's work on experts of the size of Llama-2-7B's, which no simulated federation has."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from torch import Tensor

from benchmarks.scale.cost_model import Load
from benchmarks.support.wire.updates import random_update
from federated.aggregation.combine import aggregate
from federated.aggregation.contribution import Contribution, summarize
from federated.wire.codec import pack_update, unpack_update, unpack_with_stats
from models.graph.unit_vectors import Unit
from server.model.pack_step import pack_step

UNIT = 3 * 172 * 4096  # weights of an expert of Llama-2-7B in 64
DENSITIES = (0.006, 0.05)
_T = TypeVar("_T")


def large_rounds(units: int, clients: int, *, unit_size: int = UNIT) -> list[tuple[Load, dict[str, float]]]:
    """Loads and CPU seconds of ``large_round`` at the densities of ``DENSITIES``."""
    large_round(
        DENSITIES[0], 1, clients, unit_size=min(unit_size, 10_000)
    )  # libraries load at their first use
    return [large_round(density, units, clients, unit_size=unit_size) for density in DENSITIES]


def large_round(density: float, units: int, clients: int, *, unit_size: int) -> tuple[Load, dict[str, float]]:
    """Check, combine and pack random updates of ``units`` experts; returns the load and the CPU seconds by part.

    Args:
        density: kept entries / all entries.
        units: experts of each update.
        clients: updates.
        unit_size: weights of an expert.
    """
    step_density, bits = 0.01, 2
    weights, keys = units * unit_size, {"graph_version": 0, "graph_hash": ""}
    sizes = {(0, expert): unit_size for expert in range(units)}
    packed = [
        pack_update(random_update(weights, density, seed=seed, unit_size=unit_size), value_bits=bits)
        for seed in range(clients)
    ]
    check, summaries = _timed(
        lambda: [summarize(unpack_with_stats(data, sizes=sizes, **keys)[0]) for data in packed]
    )
    contributions = [
        Contribution(1.0, partial(unpack_update, data, sizes=sizes, **keys), summary=summary)
        for data, summary in zip(packed, summaries, strict=True)
    ]
    fold, change = _timed(lambda: aggregate(contributions, combine="entrywise", clip_norm_multiple=2.0))
    residual: dict[Unit, Tensor] = {}
    pack_step(
        change, residual, density=step_density, value_bits=bits, **keys
    )  # from the second round on there is one
    pack, _ = _timed(lambda: pack_step(change, residual, density=step_density, value_bits=bits, **keys))
    load = Load(
        asked=clients,
        used=clients,
        failed=0,
        weights=weights,
        held=1.0,
        density=density,
        step_density=step_density,
        value_bits=bits,
        layers=1,
        experts=units,
        missing_steps=0,
        missing_first=0,
        fresh=0,
        kept_steps=0,
    )
    return load, {"check": check, "aggregate": fold, "pack": pack}


def _timed(run: Callable[[], _T]) -> tuple[float, _T]:
    """CPU seconds of the calling thread, and the result."""
    started = time.thread_time()
    result = run()
    return time.thread_time() - started, result
