"""Settings and jobs of the robustness benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.support.federation_run import FederationSettings
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


@dataclass(frozen=True, kw_only=True)
class Settings(FederationSettings):
    """Amount of training and of measurement; the learning rate falls linearly.

    Attributes:
        domains: text of the clients, of which each has equal parts.
        attackers: number of hostile clients among the clients.
        attacks: names of attacks.
    """

    domains: Sequence[str]
    attackers: int
    attacks: Sequence[str]


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
