"""Token sets of the experts of an opened model, recorded in the forward pass that collects saliency.

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
    """Collect saliency and routed tokens of every expert on text, in one forward pass.

    Args:
        model: any with experts (see ``models.moe.views``), put into evaluation mode.
        batches: ``(input_ids [B, S], token_mask [B, S] bool)``; tokens outside the mask are padding and left out.
        on_batch: called with the number of batches done.

    Returns:
        The saliency, and per MoE layer packed bits, uint8 ``[E, B]``: whether each token of the masks is routed to
        the expert.

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
    """Recorder of the tokens routed to each expert, one bit per token and expert.

    Args:
        layers: layers with experts, in order.
    """

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self._experts = [layer.num_experts for layer in layers]
        self._parts: list[list[np.ndarray]] = [[] for _ in layers]
        self._token_mask = np.empty(0, dtype=bool)
        self._visited: list[Tensor] = []

    def starting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches unchanged, and reset the record of the current batch at each."""
        for input_ids, token_mask in batches:
            self._token_mask = token_mask.flatten().numpy()
            self._visited = [
                torch.zeros(number, token_mask.numel(), dtype=torch.bool) for number in self._experts
            ]
            yield input_ids, token_mask

    def add(self, layer: MoELayer, rows: ExpertRows) -> None:
        """Record the tokens of one expert."""
        self._visited[layer.ordinal][rows.expert, rows.tokens.cpu()] = True

    def finish(self) -> None:
        """Pack the masked tokens of the current batch."""
        for parts, visited_ET in zip(self._parts, self._visited, strict=True):
            parts.append(pack_visits(visited_ET.numpy()[:, self._token_mask]))

    def packed(self) -> list[np.ndarray]:
        """Packed bits per layer, uint8 ``[E, B]``; each batch starts a new byte."""
        return [np.concatenate(parts, axis=1) for parts in self._parts]
