"""Options of healing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.choices import HealedParts, HealingLoss, Precision, check_choice
from configs.errors import UserError


@dataclass(frozen=True)
class HealingOptions:
    """Options of healing.

    Attributes:
        steps: optimizer steps; 0: chosen from ``minutes``.
        minutes: time of the optimizer steps in minutes, from which their number is computed after the first steps;
            0 where ``steps`` are given.
        train: trained parameters, see ``configs.choices.HealedParts``.
        rank: rank of the LoRA factors, with ``train`` = lora.
        learning_rate: peak learning rate of Adam; it rises over ``warmup_steps`` and falls to 0 along a cosine.
        warmup_steps: steps before the first at the peak learning rate.
        loss: see ``configs.choices.HealingLoss``.
        hidden_weight: weight of the distance of hidden states beside the divergence of logits.
        temperature: temperature of both distributions of the divergence.
        batch_size: blocks per optimizer step.
        max_grad_norm: norm to which the gradient is clipped; 0: none.
        seed: seed of the order of blocks and of the LoRA factors.
        precision: precision of matrix products: ``fp32``, ``bf16``, or ``auto`` for the faster.
        save_seconds: shortest time between two saved states, in seconds.
    """

    steps: int = 0
    minutes: float = 0.0
    train: str = HealedParts.EXPERTS
    rank: int = 16
    learning_rate: float = 1e-4
    warmup_steps: int = 4
    loss: str = HealingLoss.KL
    hidden_weight: float = 1.0
    temperature: float = 1.0
    batch_size: int = 4
    max_grad_norm: float = 1.0
    seed: int = 0
    precision: str = Precision.AUTO
    save_seconds: float = 60.0

    def __post_init__(self):
        check_choice("`train`", self.train, HealedParts)
        check_choice("`loss`", self.loss, HealingLoss)
        check_choice("`precision`", self.precision, Precision)
        if self.precision == Precision.NF4:
            raise UserError(
                "expected `precision` to be auto, fp32 or bf16, got nf4, in which weights cannot train"
            )
        if (self.steps > 0) == (self.minutes > 0) or min(self.steps, self.minutes) < 0:
            raise UserError(
                f"expected either `steps` or `minutes` above 0, got {self.steps} and {self.minutes:g}"
            )
        for name in ("rank", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"expected `{name}` of at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "temperature"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"expected a `{name}` above 0, got {getattr(self, name)}")
