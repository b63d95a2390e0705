"""Forward passes one decoder layer at a time: a layer can be changed before the next one receives its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass
class LayerInputs:
    """Decoder layer with its inputs for every batch.

    Attributes:
        index: index of the decoder layer.
        layer: decoder layer.
        hidden: hidden states per batch, ``[B, S, D]``.
    """

    index: int
    layer: nn.Module
    hidden: list[Tensor]
    _arguments: list[dict[str, Any]]

    @torch.no_grad()
    def run(self, on_batch: Callable[[int], None] = lambda batch: None) -> list[Tensor]:
        """Output of the layer per batch, ``[B, S, D]``; ``on_batch`` is called with the index before each."""
        outputs = []
        for batch, (hidden, arguments) in enumerate(zip(self.hidden, self._arguments, strict=True)):
            on_batch(batch)
            output = self.layer(hidden, **arguments)
            outputs.append(output[0] if isinstance(output, tuple) else output)
        return outputs


@torch.no_grad()
def walk_layers(
    model: PreTrainedModel, batches: Sequence[tuple[Tensor, dict[str, Tensor]]]
) -> Iterator[LayerInputs]:
    """Yield the decoder layers in order, each with its inputs from the current state of the layers before it.

    Hidden states of one layer are in memory for all batches. The other arguments of each layer (masks, positions) are
    recorded in a first pass; they do not depend on hidden states.

    Args:
        model: a decoder with ``model.layers``.
        batches: ``(input_ids [B, S], keyword arguments of the model)``, on the model's device.
    """
    decoders = list(model.model.layers)
    arguments: list[list[dict[str, Any]]] = [[] for _ in decoders]
    hidden: list[Tensor] = []
    for input_ids, further in batches:
        found = _record(model, decoders, input_ids, further)
        hidden.append(found[0][0])
        for index, (_, keywords) in enumerate(found):
            arguments[index].append(keywords)
    for index, decoder in enumerate(decoders):
        inputs = LayerInputs(index, decoder, hidden, arguments[index])
        yield inputs
        hidden = inputs.run()


def _record(
    model: PreTrainedModel, decoders: Sequence[nn.Module], input_ids: Tensor, further: dict[str, Tensor]
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Hidden states and keyword arguments of each decoder layer's call."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def note(_: nn.Module, positional: tuple, keywords: dict[str, Any]) -> None:
        rest = {name: value for name, value in keywords.items() if name != "hidden_states"}
        calls.append((positional[0] if positional else keywords["hidden_states"], rest))

    hooks = [decoder.register_forward_pre_hook(note, with_kwargs=True) for decoder in decoders]
    try:
        model.model(input_ids=input_ids, use_cache=False, **further)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
