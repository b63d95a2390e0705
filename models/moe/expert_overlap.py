"""Which tokens visit which expert of an opened model, noted in the pass that collects saliency.

Shape suffixes: E experts, T tokens, B bytes of one bit per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from experts.merging.similarity import pack_visits
from experts.saliency.measures import Saliency
from models.moe.layers import ExpertRows, MoELayer
from models.moe.saliency_collection import Batch, collect_saliency
from models.moe.views import moe_layers


def collect_overlap(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    on_batch: Callable[[int], None] = lambda done: None,
) -> tuple[Saliency, list[np.ndarray]]:
    """Saliency and visits of every expert on text, in one forward pass.

    Args:
        model: any with experts (see ``models.moe.views``), put into evaluation mode.
        batches: ``(input_ids [B, S], counted [B, S] bool)``; padding is not noted.
        on_batch: called with the number of batches done.

    Returns:
        The saliency, and per MoE layer packed bits, uint8 ``[E, B]``: which of the counted tokens visit which expert.

    Raises:
        UserError: a model without experts, or no token.
    """
    visits = TokenVisits(moe_layers(model))

    def finish(done: int) -> None:
        visits.finish()
        on_batch(done)

    saliency = collect_saliency(model, visits.starting(batches), on_rows=visits.add, on_batch=finish)
    return saliency, visits.packed()


class TokenVisits:
    """Visits noted batch by batch, a bit each.

    Args:
        layers: with experts, in order.
    """

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self._experts = [layer.num_experts for layer in layers]
        self._parts: list[list[np.ndarray]] = [[] for _ in layers]
        self._counted = np.empty(0, dtype=bool)
        self._visited: list[Tensor] = []

    def starting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches as they are; each is begun when it is taken."""
        for input_ids, counted in batches:
            self._counted = counted.flatten().numpy()
            self._visited = [
                torch.zeros(number, counted.numel(), dtype=torch.bool) for number in self._experts
            ]
            yield input_ids, counted

    def add(self, layer: MoELayer, rows: ExpertRows) -> None:
        """Note who visits an expert."""
        self._visited[layer.ordinal][rows.expert, rows.tokens.cpu()] = True

    def finish(self) -> None:
        """Pack the tokens of the batch that count."""
        for parts, visited_ET in zip(self._parts, self._visited, strict=True):
            parts.append(pack_visits(visited_ET.numpy()[:, self._counted]))

    def packed(self) -> list[np.ndarray]:
        """Per layer uint8 ``[E, B]``; each batch begins a byte."""
        return [np.concatenate(parts, axis=1) for parts in self._parts]
