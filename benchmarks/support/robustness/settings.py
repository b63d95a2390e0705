"""Settings and jobs of the robustness benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.support.robustness.attacks import ATTACKS

# Keys of the two ways of aggregating that are compared.
AGGREGATIONS: dict[str, dict[str, Any]] = {
    "robust": {"combine": "trimmed-mean", "opposition_limit": 0.1},
    "mean": {
        "combine": "entrywise",
        "weight_cap": 0.0,
        "clip_norm_multiple": 0.0,
        "clip_unit_multiple": 0.0,
        "opposition_limit": 0.0,
    },
}


@dataclass(frozen=True)
class Settings:
    """Amount of training and of measurement.

    Attributes:
        domains: text of the clients, of which each has equal parts.
        num_clients: clients, hostile ones included.
        attackers: number of hostile clients.
        experts: E of each layer.
        rounds: server rounds.
        train_blocks: training blocks of a client.
        valid_blocks: held-out blocks of a client.
        block_size: tokens per block.
        batch_size: blocks per batch.
        local_steps: optimizer steps of a client per round.
        learning_rate: learning rate of the clients, with a linear schedule.
        seeds: seeds of clusters, data order and batches.
        attacks: names of attacks.
        calibration_tokens: calibration tokens of the bootstrap, sampled from the model.
        model: name of the dense model, see ``material.model_path``.
    """

    domains: Sequence[str]
    num_clients: int
    attackers: int
    experts: int
    rounds: int
    train_blocks: int
    valid_blocks: int
    block_size: int
    batch_size: int
    local_steps: int
    learning_rate: float
    seeds: Sequence[int]
    attacks: Sequence[str]
    calibration_tokens: int
    model: str = "mix7M"


FULL = Settings(
    domains=("stories", "shakespeare", "law_dc", "medical_qa", "math_gsm8k"),
    num_clients=10,
    attackers=2,
    experts=16,
    rounds=12,
    train_blocks=400,
    valid_blocks=24,
    block_size=128,
    batch_size=4,
    local_steps=10,
    learning_rate=5e-4,
    seeds=(0, 1, 2),
    attacks=tuple(ATTACKS),
    calibration_tokens=8192,
)
QUICK = replace(
    FULL,
    domains=("a", "b"),
    num_clients=4,
    attackers=1,
    experts=4,
    rounds=1,
    train_blocks=4,
    valid_blocks=2,
    block_size=32,
    local_steps=1,
    seeds=(0,),
    attacks=("flipped", "nan"),
    calibration_tokens=256,
)


@dataclass(frozen=True)
class Job:
    """One federation.

    Attributes:
        aggregation: name in ``AGGREGATIONS``.
        attack: name of an attack; empty: all clients are honest.
        seed: see ``Settings``.
        keys: further keys of the run configuration, by their Python names.
    """

    aggregation: str
    attack: str
    seed: int
    keys: Mapping[str, Any] = field(default_factory=dict)
