"""Arms and amounts of the privacy benchmark."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.support.runner import ROOT
from configs.schema import RunConfig, load_run_config

DEFAULT, CLIPPED = "default", "clipped"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: of the arm's figures.
        noise: noise multiplier z; None: the default configuration, without differential privacy.
        clients: N, all of whom are asked in each round.
    """

    name: str
    noise: float | None
    clients: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Amount of training and of measurement.

    Attributes:
        arms: see ``Arm``.
        seed: of data, batches and positions.
        data: data sources of the clients, as in a run configuration; dealt to them at random.
        documents: training documents of each domain.
        rounds: server rounds.
        local_steps: optimizer steps of a client per round.
        batch_size: blocks per batch.
        block_size: tokens per block.
        valid_blocks: held-out blocks on which the models are compared.
        experts: E of each layer.
        calibration_tokens: calibration tokens of the bootstrap, sampled from the model.
    """

    arms: Sequence[Arm]
    seed: int = 0
    data: str = "wikimix:dialogue,recipes"
    documents: int = 600
    rounds: int = 4
    local_steps: int = 2
    batch_size: int = 4
    block_size: int = 128
    valid_blocks: int = 64
    experts: int = 16
    calibration_tokens: int = 4096

    def config(self, arm: Arm, *, graph: Path, folder: Path) -> RunConfig:
        """Run configuration of an arm; ``folder`` receives logs and model."""
        values = {} if arm.noise is None else private_keys() | {"dp-noise-multiplier": arm.noise}
        return load_run_config(
            values
            | {
                "graph": str(graph),
                "log-dir": str(folder / "logs"),
                "out": str(folder / "trained"),
                "data": self.data,
                "partition": "iid",
                "train-documents": self.documents,
                "num-clients": arm.clients,
                "num-rounds": self.rounds,
                "local-steps": self.local_steps,
                "batch-size": self.batch_size,
                "block-size": self.block_size,
                "schedule": "constant",
                "eval-blocks": 1,
                "rho-max": 0,
                "keep-best": False,
                "seed": self.seed,
                "device": "cpu",
            }
        )


def private_keys() -> Mapping[str, Any]:
    """Keys of ``configs/private.toml``."""
    return tomllib.loads((ROOT / "configs" / "private.toml").read_text(encoding="utf-8"))


MANY, FEW = 40, 8
FULL = Settings(
    arms=(
        Arm(DEFAULT, None, MANY),
        Arm(CLIPPED, 0.0, MANY),
        Arm("noise_0_5", 0.5, MANY),
        Arm("noise_1", 1.0, MANY),
        Arm("noise_2_5", 2.5, MANY),
        Arm("noise_5", 5.0, MANY),
        Arm("few_default", None, FEW),
        Arm("few_noise_1", 1.0, FEW),
    )
)
QUICK = replace(
    FULL,
    arms=(Arm(DEFAULT, None, 2), Arm("noise_1", 1.0, 2)),
    documents=20,
    rounds=2,
    local_steps=1,
    block_size=32,
    valid_blocks=4,
    experts=4,
    calibration_tokens=256,
)
