"""Deviation of an exported model from the model that it was made of, on held-out text.

Shape suffixes: N blocks, S tokens per block, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from models.runtime.perplexity import IGNORED, LossSum


@dataclass(frozen=True)
class Deviation:
    """Sums over predicted tokens; those of several texts add up.

    Attributes:
        before: loss of the reference.
        after: loss of the exported model.
        kl: Kullback-Leibler divergence of the exported model from the reference, in nats.
        logit_difference: absolute difference of logits, averaged over the vocabulary.
        max_logit_difference: largest absolute difference of a logit.
        agreed: tokens for which both models give the same token the largest logit.
    """

    before: LossSum = LossSum()
    after: LossSum = LossSum()
    kl: float = 0.0
    logit_difference: float = 0.0
    max_logit_difference: float = 0.0
    agreed: int = 0

    def __add__(self, other: Deviation) -> Deviation:
        return Deviation(
            self.before + other.before,
            self.after + other.after,
            self.kl + other.kl,
            self.logit_difference + other.logit_difference,
            max(self.max_logit_difference, other.max_logit_difference),
            self.agreed + other.agreed,
        )

    def figures(self) -> dict[str, Any]:
        """Means per token, perplexities, and the number of tokens."""
        tokens = max(self.before.tokens, 1)
        return {
            "mean_kl": self.kl / tokens,
            "mean_logit_difference": self.logit_difference / tokens,
            "max_logit_difference": self.max_logit_difference,
            "argmax_agreement": self.agreed / tokens,
            "perplexity": {"before": self.before.perplexity, "after": self.after.perplexity},
            "tokens": self.before.tokens,
        }


@torch.no_grad()
def block_logits(model: PreTrainedModel, input_ids: Tensor) -> Iterator[Tensor]:
    """Logits ``[S, V]``, fp32 on the CPU, of each block of ``input_ids [N, S]``."""
    for ids in input_ids:
        yield model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].float().cpu()


def measure_deviation(
    reference: PreTrainedModel,
    exported: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    *,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> Deviation:
    """Compare two models on the tokens that have a label.

    Args:
        reference: model that was exported, in evaluation mode.
        exported: model to compare, in evaluation mode.
        input_ids: int64 ``[N, S]``.
        labels: int64 ``[N, S]``; -100 for tokens without a loss.
        on_block: called with the blocks done and their number.
    """
    total = Deviation()
    pairs = zip(block_logits(reference, input_ids), block_logits(exported, input_ids), strict=True)
    for done, (expected_SV, found_SV) in enumerate(pairs, 1):
        total += token_deviation(expected_SV[:-1], found_SV[:-1], labels[done - 1, 1:])
        on_block(done, len(input_ids))
    return total


def token_deviation(expected_TV: Tensor, found_TV: Tensor, targets_T: Tensor) -> Deviation:
    """Deviation of the logits ``[T, V]`` of one text; ``targets_T``: next tokens, -100 for those that do not count."""
    counted_T = targets_T != IGNORED
    tokens, targets_T = int(counted_T.sum()), targets_T[counted_T]
    expected_TV, found_TV = expected_TV[counted_T], found_TV[counted_T]
    before_TV, after_TV = expected_TV.double().log_softmax(-1), found_TV.double().log_softmax(-1)
    difference_TV = (expected_TV - found_TV).abs()
    return Deviation(
        LossSum(float(F.nll_loss(before_TV, targets_T, reduction="sum")), tokens),
        LossSum(float(F.nll_loss(after_TV, targets_T, reduction="sum")), tokens),
        float((before_TV.exp() * (before_TV - after_TV)).sum()),
        float(difference_TV.mean(-1).sum()),
        float(difference_TV.max()) if tokens else 0.0,
        int((expected_TV.argmax(-1) == found_TV.argmax(-1)).sum()),
    )


def mean_kl(expected: Sequence[Tensor], model: PreTrainedModel, input_ids: Tensor) -> float:
    """Mean divergence in nats per token of a model from the logits ``[S, V]`` of each block of ``input_ids``."""
    total = Deviation()
    for expected_SV, found_SV, ids in zip(expected, block_logits(model, input_ids), input_ids, strict=True):
        total += token_deviation(expected_SV[:-1], found_SV[:-1], ids[1:])
    return total.figures()["mean_kl"]
