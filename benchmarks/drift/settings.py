"""Settings, arms and jobs of the drift benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.support.federation_run import FederationSettings

WITHOUT, WITH = "without", "with"
# Keys of the compared runs, by their Python names: the most experts that growth adds to a layer.
ARMS: dict[str, dict[str, Any]] = {WITHOUT: {"max_spawned": 0}, WITH: {"max_spawned": 4}}


@dataclass(frozen=True, kw_only=True)
class Settings(FederationSettings):
    """Amount of training and of measurement; the learning rate is constant.

    Attributes:
        before: domains of the clients up to the switch, dealt to them in turn.
        after: domains from then on, which no client had.
        changed: clients whose domain changes, the first ones.
        visits: experts per token and layer.
        switch: last round with the first domains, of which ``rounds`` is a multiple.
        upload_budget_mb: MB of each packed update.
    """

    before: Sequence[str]
    after: Sequence[str]
    changed: int
    visits: int
    switch: int
    upload_budget_mb: float


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
