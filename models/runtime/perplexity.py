"""Token-weighted perplexity of a causal language model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

# Label of tokens without a loss, as in Hugging Face models.
IGNORED = -100


@dataclass(frozen=True)
class LossSum:
    """Negative log-likelihood summed over predicted tokens, in nats; sums of several texts add up."""

    nll: float = 0.0
    tokens: int = 0

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(self.nll + other.nll, self.tokens + other.tokens)

    @property
    def mean(self) -> float:
        """Mean loss in nats per token; NaN without tokens."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """``exp(mean)``; infinite on overflow."""
        return math.exp(self.mean) if not self.mean > 700 else math.inf


@torch.no_grad()
def evaluate_loss(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, *, batch_size: int = 16, autocast: bool = False
) -> LossSum:
    """Sum the loss of predicting each labeled token from those before it in its block.

    Args:
        model: set to evaluation mode during the call.
        input_ids: int64 ``[N, S]``.
        labels: int64 ``[N, S]``; -100 for tokens without a loss.
        batch_size: blocks per forward pass.
        autocast: run matrix products in bf16.
    """
    was_training, total = model.training, LossSum()
    if not input_ids.numel():
        return total
    model.eval()
    for ids, targets in zip(input_ids.split(batch_size), labels.split(batch_size), strict=True):
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        wanted = targets[:, 1:].to(logits.device)
        nll = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), wanted.flatten(), reduction="sum")
        total += LossSum(float(nll), int((wanted != IGNORED).sum()))
    model.train(was_training)
    return total


def batches_loss(model: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor]]) -> LossSum:
    """Sum the loss over batches ``(input_ids [B, S], token_mask [B, S] bool)``; see ``evaluate_loss``."""
    losses = (evaluate_loss(model, ids, ids.masked_fill(~token_mask, IGNORED)) for ids, token_mask in batches)
    return sum(losses, LossSum())
