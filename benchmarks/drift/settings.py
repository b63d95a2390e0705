"""Settings, arms and jobs of the drift benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

WITHOUT, WITH = "without", "with"
# Keys of the compared runs, by their Python names: the most experts that growth adds to a layer.
ARMS: dict[str, dict[str, Any]] = {WITHOUT: {"max_spawned": 0}, WITH: {"max_spawned": 4}}


@dataclass(frozen=True)
class Settings:
    """Amount of training and of measurement.

    Attributes:
        before: domains of the clients up to the switch, dealt to them in turn.
        after: domains from then on, which no client had.
        num_clients: clients.
        changed: clients whose domain changes, the first ones.
        experts: E of each layer at the start.
        visits: experts per token and layer.
        switch: last round with the first domains.
        rounds: server rounds; a multiple of ``switch``.
        upload_budget_mb: MB of each packed update.
        train_blocks: training blocks of a client.
        valid_blocks: held-out blocks of a client.
        block_size: tokens per block.
        batch_size: blocks per batch.
        local_steps: optimizer steps of a client per round.
        learning_rate: constant learning rate of the clients.
        seeds: seeds of clusters, data order and batches.
        calibration_tokens: calibration tokens of the bootstrap, sampled from the model.
        model: name of the dense model, see ``material.model_path``.
    """

    before: Sequence[str]
    after: Sequence[str]
    num_clients: int
    changed: int
    experts: int
    visits: int
    switch: int
    rounds: int
    upload_budget_mb: float
    train_blocks: int
    valid_blocks: int
    block_size: int
    batch_size: int
    local_steps: int
    learning_rate: float
    seeds: Sequence[int]
    calibration_tokens: int
    model: str = "mix7M"


FULL = Settings(
    before=("stories", "shakespeare", "law_dc", "code_algos"),
    after=("medical_qa", "math_gsm8k", "recipes"),
    num_clients=8,
    changed=8,
    experts=16,
    visits=8,
    switch=6,
    rounds=18,
    upload_budget_mb=0.045,
    train_blocks=400,
    valid_blocks=24,
    block_size=128,
    batch_size=4,
    local_steps=10,
    learning_rate=5e-4,
    seeds=(0, 1, 2),
    calibration_tokens=8192,
)
QUICK = replace(
    FULL,
    before=("a", "b"),
    after=("c",),
    num_clients=2,
    changed=2,
    experts=4,
    visits=2,
    switch=2,
    rounds=4,
    train_blocks=4,
    valid_blocks=2,
    block_size=32,
    local_steps=1,
    seeds=(0,),
    calibration_tokens=256,
)


@dataclass(frozen=True)
class Job:
    """One federation.

    Attributes:
        arm: name in ``ARMS``.
        seed: see ``Settings``.
        keys: further keys of the run configuration, by their Python names.
    """

    arm: str
    seed: int
    keys: Mapping[str, Any] = field(default_factory=dict)


def keys_of(job: Job) -> dict[str, Any]:
    """Keys of the job's run configuration, by their Python names, apart from those of ``Settings``."""
    return {"schedule": "constant"} | ARMS[job.arm] | dict(job.keys)
