"""Settings and jobs of the benchmarks of federated quality per byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

DOMAINS = ("stories", "shakespeare", "law_dc", "medical_qa", "math_gsm8k", "code_algos", "recipes")


Rate = tuple[float, str]


@dataclass(frozen=True)
class Settings:
    """Amount of training and of measurement.

    Attributes:
        domains: text of one client each; one more client has wikimix.
        experts: E of each layer.
        rounds: rounds of the baselines.
        most_rounds: rounds of ours; its bytes count up to the round that reaches a baseline's loss.
        train_blocks: training blocks of a client.
        valid_blocks: held-out blocks of a client.
        block_size: tokens per block.
        batch_size: blocks per batch.
        local_steps: optimizer steps of a client per round.
        seeds: seeds of the data order, the clusters and the batches.
        half_seeds: seeds of the runs with half of the experts active, in which routers and gains train, too.
        learning_rates: candidate learning rates and schedules of each method; with half of the experts active, the
            chosen ones of all active are taken where the benchmark runs both.
        calibration_tokens: calibration tokens of the bootstrap.
        jobs: runs side by side, one thread each.
        model: name of the dense model, see ``material.model_path``.
        bootstrap: options of the bootstrap apart from experts and seed, see ``BootstrapOptions``.
        calibration: domain of the calibration text, which no client has; empty: text sampled from the model.
        keys: keys of the run configuration of all methods, by their Python names.
        apart: run each job, and the clients of ours, in processes of their own, whose peak memory is measured.
    """

    domains: Sequence[str]
    experts: int
    rounds: int
    most_rounds: int
    train_blocks: int
    valid_blocks: int
    block_size: int
    batch_size: int
    local_steps: int
    seeds: Sequence[int]
    half_seeds: Sequence[int]
    learning_rates: Mapping[str, Sequence[Rate]]
    calibration_tokens: int
    jobs: int
    model: str = "mix7M"
    bootstrap: Mapping[str, Any] = field(default_factory=dict)
    calibration: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)
    apart: bool = False


# The best of each method in an earlier search on the same model, domains and rounds: dense 1e-3 and 2e-3 constant, 2e-3
# linear; fedit 2e-3, 5e-3 and 1e-2 constant, 5e-3 linear; ours 5e-4, 7e-4 and 1e-3 linear.
RATES: dict[str, Sequence[Rate]] = {
    "dense": ((2e-3, "linear"),),
    "ours": ((5e-4, "linear"),),
    "fedit": ((5e-3, "constant"),),
}
FULL = Settings(DOMAINS, 16, 12, 20, 400, 24, 128, 4, 10, (0, 1, 2), (0, 1, 2), RATES, 8192, 2)
QUICK = replace(
    FULL,
    domains=("a",),
    experts=4,
    rounds=1,
    most_rounds=2,
    train_blocks=4,
    valid_blocks=2,
    block_size=32,
    local_steps=1,
    seeds=(0,),
    half_seeds=(0,),
    calibration_tokens=256,
    jobs=1,
)


@dataclass(frozen=True)
class Job:
    """One method with one seed at one learning rate and schedule.

    Attributes:
        method: ``dense``, ``ours`` or ``fedit``; after ``half ``, on the expert graph with half of the experts active.
        seed: seed of data order, clusters and batches.
        learning_rate: learning rate of the clients, and its schedule.
        keys: further keys of the run configuration, by their Python names.
    """

    method: str
    seed: int
    learning_rate: Rate
    keys: Mapping[str, Any] = field(default_factory=dict)
