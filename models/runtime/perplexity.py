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
# Most logits of one forward pass of an evaluation: 128 MiB in fp32. A block is never divided.
_MOST_LOGITS = 2**25


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

    A forward pass has fewer blocks where the logits of ``batch_size`` would take more than 128 MiB in fp32.

    Args:
        model: set to evaluation mode during the call.
        input_ids: int64 ``[N, S]``.
        labels: int64 ``[N, S]``; -100 for tokens without a loss.
        batch_size: most blocks per forward pass.
        autocast: run matrix products in bf16.
    """
    was_training, total = model.training, LossSum()
    if not input_ids.numel():
        return total
    model.eval()
    block_logits = input_ids.shape[1] * model.config.get_text_config().vocab_size
    batch_size = max(1, min(batch_size, _MOST_LOGITS // block_logits))
    for ids, targets in zip(input_ids.split(batch_size), labels.split(batch_size), strict=True):
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        for row, wanted in zip(logits[:, :-1], targets[:, 1:].to(logits.device), strict=True):
            nll = F.cross_entropy(row.float(), wanted, reduction="sum")
            total += LossSum(float(nll), int((wanted != IGNORED).sum()))
        del logits  # before the next pass makes as many
    model.train(was_training)
    return total


def batches_loss(model: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor]]) -> LossSum:
    """Sum the loss over batches ``(input_ids [B, S], token_mask [B, S] bool)``; see ``evaluate_loss``."""
    losses = (evaluate_loss(model, ids, ids.masked_fill(~token_mask, IGNORED)) for ids, token_mask in batches)
    return sum(losses, LossSum())
