"""Size and speed of packed updates, relative to their entropy and to plain codings.

The entropy floor of an index column is ``n * H(density)`` bits for n entries. Real masks select the largest entries of
the expert changes of one round of local training, one client per domain, concatenated as layers of one model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from benchmarks.support.runner import Measured, OnStep, run_benchmark
from benchmarks.support.wire.lowrank import energy_ratios
from benchmarks.support.wire.peers import dense_peers, speed_figures
from benchmarks.support.wire.updates import (
    TrainingSettings,
    kept,
    random_update,
    side_by_side,
    trained_updates,
)
from clients.training.trainer import LocalTraining
from configs.schema import RunConfig
from federated.updates.update import SparseUpdate, SparseVector, Unit
from federated.wire.codec import pack_update, packed_stats

# Smallest packed update, in bytes, whose container share is reported.
_LARGE = 100_000
# Bits per value, except where 2 bits are compared.
_BITS = 4


@dataclass(frozen=True)
class Settings:
    """Amounts of measurement.

    Attributes:
        entries: entries of the random masks.
        densities: densities of random and real masks.
        training: local training behind the real updates.
        speed_density: density of the timed update.
        repeats: repetitions of timings.
        ranks: ranks of the low-rank factors compared with sparse entries.
        every: stride over experts in that comparison.
    """

    entries: int
    densities: Sequence[float]
    training: TrainingSettings
    speed_density: float
    repeats: int
    ranks: Sequence[int]
    every: int


FULL = Settings(
    10_000_000,
    (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3),
    TrainingSettings(
        ("math_gsm8k", "medical_qa", "code_algos", "stories"),
        16,
        128,
        256,
        8192,
        LocalTraining.of(
            RunConfig(local_steps=20, learning_rate=1e-3, schedule="constant").training, autocast=False
        ),
    ),
    0.05,
    15,
    (1, 4, 16),
    8,
)
QUICK = replace(
    FULL,
    entries=200_000,
    densities=(0.01, 0.3),
    training=replace(
        FULL.training,
        domains=("a", "b"),
        experts=8,
        blocks=4,
        block_size=32,
        calibration_tokens=256,
        training=replace(FULL.training.training, local_steps=2),
    ),
    repeats=1,
    ranks=(1,),
    every=16,
)


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Bytes of uniform masks, real masks and values, and seconds of packing and unpacking."""
    settings = QUICK if quick else FULL
    trained = trained_updates(settings.training, quick=quick, density=settings.speed_density, bits=_BITS)
    changes = trained.changes
    on_step("local training, masks, speed", 1, 3)
    vectors = side_by_side(changes)
    uniform = {str(p): _sizes(random_update(settings.entries, p, seed=0)) for p in settings.densities}
    real = {
        f"{p}, {name}": _sizes(kept(vectors, p, shared=name == "of all units"))
        for p in settings.densities
        for name in ("of each unit", "of all units")
    }
    clients = {
        name: _client_index(units, settings)
        for name, units in zip(settings.training.domains, changes, strict=False)
    }
    on_step("local training, masks, speed", 2, 3)
    speed = speed_figures(vectors, density=settings.speed_density, bits=_BITS, repeats=settings.repeats)
    peers = dense_peers(vectors, repeats=min(3, settings.repeats))
    lowrank = {
        f"{name}, rank {rank}": energy_ratios(trained.matrices(units, settings.every), rank=rank, bits=_BITS)
        for name, units in (("one round", vectors), ("with a residual", trained.carried))
        for rank in settings.ranks
    }
    on_step("local training, masks, speed", 3, 3)
    return _summary(uniform, real, speed, {**peers, **speed["peers"]}, lowrank, clients)


def _summary(uniform, real, speed, peers, lowrank, clients) -> Measured:
    large = [row["container_share"] for row in real.values() if row["bytes"] >= _LARGE]
    return Measured(
        figures={
            "index_over_entropy_uniform_max": max(row["index_over_entropy"] for row in uniform.values()),
            "index_over_entropy_real_max": max(row["index_over_entropy"] for row in real.values()),
            "int4_bits": max(row["bits_4"] for row in real.values()),
            "bit2_bits": max(row["bits_2"] for row in real.values()),
            "overhead_bytes": float(smallest_bytes()),
            "container_share_100k": max(large) if large else None,
            **speed["figures"],
        },
        peers={
            "entries": {
                "uniform": uniform[next(iter(uniform))]["entries"],
                "real": real[next(iter(real))]["entries"],
            },
            "uniform": uniform,
            "real": real,
            "index_over_entropy_real_by_client": clients,
            "sent": peers,
            "lowrank_energy_over_sparse_at_equal_bytes": lowrank,
        },
        notes={
            "index_over_entropy_real_max": "largest entries of each unit and of all units, all clients side by side",
            "int4_bits": "bits per value, block scales included, on the real updates; maximum over densities",
            "bit2_bits": "likewise",
            "overhead_bytes": "packed size of an update of one entry of one unit",
            "container_share_100k": "of packed updates of at least 100 kB, at 4 bits; None where there is none",
            "pack_speed_ratio": "seconds of torch.topk + int32 positions + fp16 values + zstd -3 over ours; both with "
            "their selection",
            "pack_speed_ratio_same_selection": "likewise, both with our selection",
            "unpack_speed_ratio": "both to the same per-unit positions (int64) and values (fp32)",
            "size_ratio": "at 4 bits",
        },
    )


def smallest_bytes() -> int:
    """Packed size of an update of one unit and one entry."""
    return len(
        pack_update(SparseUpdate(1, "0" * 64, {(0, 0): SparseVector(50_000, [7], [1e-3])}), value_bits=_BITS)
    )


def _sizes(update: SparseUpdate) -> dict[str, float]:
    """Sizes of an update packed at 4 bits, and bits per value at 2 bits."""
    four, two = (packed_stats(pack_update(update, value_bits=bits)) for bits in (_BITS, 2))
    count = sum(vector.indices.size for vector in update.vectors.values())
    return {
        "entries": four.raw_bytes // 2,
        "kept": count,
        "bytes": four.packed_bytes,
        "index_bytes": four.index_bytes,
        "index_floor_bytes": four.index_floor_bytes,
        "index_over_entropy": four.index_bytes / four.index_floor_bytes,
        "floor_bits_per_entry": 8 * four.index_floor_bytes / (four.raw_bytes / 2),
        "bits_4": 8 * four.value_bytes / count,
        "bits_2": 8 * two.value_bytes / count,
        "container_share": 1 - (four.index_bytes + four.value_bytes) / four.packed_bytes,
    }


def _client_index(units: Mapping[Unit, Tensor], settings: Settings) -> dict[str, float]:
    """Index bytes over entropy floor of a single client, by density."""
    rows = {p: packed_stats(pack_update(kept(units, p), value_bits=_BITS)) for p in settings.densities}
    return {str(p): row.index_bytes / row.index_floor_bytes for p, row in rows.items()}


if __name__ == "__main__":
    run_benchmark("wire", measure)
