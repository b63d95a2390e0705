"""Memory of one accepted reply on the server, apart from its update, which is on disk."""

from __future__ import annotations

import tracemalloc

import numpy as np

from federated.aggregation.contribution import UnitSummary, UpdateSummary
from federated.aggregation.usage import pack_usage, unpack_usage


def reply_memory(layers: int = 32, experts: int = 64) -> dict[str, float]:
    """Bytes per shipped unit, for its entries in the summary and the set of trained units, and per usage count."""
    packed = pack_usage([np.triu(np.ones((experts, experts), dtype=np.int64))] * layers)
    tracemalloc.start()
    try:
        units = [(layer, expert) for layer in range(layers) for expert in range(experts)]
        held = UpdateSummary((unit, UnitSummary(float(unit[1]), 1 << 20, 1 << 24)) for unit in units), set(
            units
        )
        for_units = tracemalloc.get_traced_memory()[0]
        usage = unpack_usage(packed, [experts] * layers)
        for_usage = tracemalloc.get_traced_memory()[0] - for_units
    finally:
        tracemalloc.stop()
    assert len(held) == 2 and len(usage) == layers  # alive until here
    return {"per unit": for_units / (layers * experts), "per usage count": for_usage / (layers * experts**2)}
