"""Checks of a sparse expert update: sizes, residency, weights, probabilities and magnitudes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from configs.run_views import ClientWeight
from experts.graph.expert_graph import ExpertGraph
from federated.aggregation.contribution import UpdateSummary, summarize
from federated.protocol.messages import Reply
from federated.updates.update import RefusedUpdate, SparseUpdate
from federated.wire.codec import unpack_update, unpack_with_stats
from federated.wire.packed_stats import PackedStats
from models.graph.unit_vectors import OTHERS, Unit
from server.strategies.strategy import PackedUpdate

REQUIRED_NUMBERS = ("examples", "train-loss")
WEIGHT_NUMBERS = {"examples": "examples", "tokens": "train-tokens"}
_LARGEST_HEADER = 1 << 16  # bytes of a packed update apart from its columns

# Bounds that no honest client exceeds and within which every sum of a round is finite.
LARGEST_CHANGE = 65504.0  # of a single weight: largest finite fp16 value
SMALLEST_INCLUSION = 2.0**-20  # inclusion probability of a shipped expert


def client_weight(reply: Reply, kind: ClientWeight) -> float:
    """Return the weight of a client: its training blocks (``examples``), the tokens of this round (``tokens``), or 1.

    Of a ``uniform`` weight no number is required.

    Raises:
        RefusedUpdate: a required number is missing, or the weight is 0.
    """
    if kind == "uniform":
        return 1.0
    name = WEIGHT_NUMBERS[kind]
    for required in (*REQUIRED_NUMBERS, name):
        if required not in reply.numbers:
            raise RefusedUpdate(f"expected the number {required}, got none")
    weight = reply.numbers[name]
    if weight < 1:
        raise RefusedUpdate(f"expected {name} of at least 1, got {weight:g}")
    return weight


def check_residents(reply: Reply, *, num_layers: int) -> None:
    """Refuse a reply without one residency mask per layer."""
    if len(reply.residents) != num_layers:
        raise RefusedUpdate(f"expected the residents of {num_layers} layers, got {len(reply.residents)}")


def check_size(size: int, sizes: Mapping[Unit, int]) -> None:
    """Refuse a packed update of more bytes than all entries uncompressed, before it is read."""
    most = 16 * sum(sizes.values()) + _LARGEST_HEADER
    if size > most:
        raise RefusedUpdate(f"expected an update of at most {most} bytes, got {size}")


def trained_units(reply: Reply, sizes: Mapping[Unit, int]) -> set[Unit]:
    """Return the units that a client may ship: its resident experts and the remaining parameters of each layer."""
    resident = {(layer, int(e)) for layer, held in enumerate(reply.residents) for e in np.flatnonzero(held)}
    return resident | {unit for unit in sizes if unit[1] == OTHERS}


def inclusion_probabilities(reply: Reply, trained: set[Unit]) -> dict[Unit, float]:
    """Return the inclusion probability of each sampled unit.

    Raises:
        RefusedUpdate: the unit is not a resident expert, or the probability is out of range.
    """
    inclusion = {}
    for name, probability in (reply.inclusion or {}).items():
        layer, _, expert = name.partition(".")
        unit = (int(layer), int(expert)) if layer.isdecimal() and expert.isdecimal() else (-1, -1)
        if unit not in trained or not SMALLEST_INCLUSION <= probability <= 1:
            raise RefusedUpdate(
                f"expected the inclusion probability of a resident expert, got {name}: {probability}"
            )
        inclusion[unit] = probability
    return inclusion


def decode_checked(
    packed: PackedUpdate, graph: ExpertGraph, sizes: Mapping[Unit, int], trained: set[Unit]
) -> tuple[Callable[[], SparseUpdate], UpdateSummary, PackedStats]:
    """Decode an update once to validate it; return a function that decodes it again, its summary and its sizes.

    The decoded values are not kept: memory is bounded by one update at a time.

    Raises:
        RefusedUpdate: the bytes are damaged, a unit was not trained, or a change is too large.
    """
    version, digest = graph.version, graph.digest()
    update, stats = unpack_with_stats(packed.read(), sizes=sizes, graph_version=version, graph_hash=digest)
    stray = set(update.vectors) - trained
    if stray:
        raise RefusedUpdate(f"expected updates of resident experts only, got {min(stray)}")
    for unit, vector in update.vectors.items():
        largest = float(np.abs(vector.values).max()) if vector.values.size else 0.0
        if largest > LARGEST_CHANGE:
            raise RefusedUpdate(
                f"expected changes of at most {LARGEST_CHANGE:.0f}, got {largest:.3g} in unit {unit}"
            )
    summary = summarize(update)

    def unpack() -> SparseUpdate:
        return unpack_update(packed.read(), sizes=sizes, graph_version=version, graph_hash=digest)

    return unpack, summary, stats
