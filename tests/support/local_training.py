"""Local training for tests: a constant learning rate of 0.01 and fp32, with changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clients.training.trainer import LocalTraining
from configs.schema import RunConfig


def local_training(**changes: Any) -> LocalTraining:
    """The defaults of a run but for a constant rate of 0.01 in fp32, with ``changes`` that nothing validates."""
    keys = RunConfig(learning_rate=0.01, schedule="constant").training
    return replace(LocalTraining.of(keys, autocast=False), **changes)
