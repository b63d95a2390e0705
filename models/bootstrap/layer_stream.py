"""Hidden states of calibration text at one decoder layer after the other, with the FFN outputs given by the caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class _Captured(Exception):
    """Ends a forward pass whose first layer has received its arguments."""


class LayerStream:
    """Hidden states before each FFN of a dense Llama, where the FFNs before it may have been replaced.

    ``ffn_input(0)``, ``add(y0)``, ``ffn_input(1)``, ... in this order: a layer's attention runs once, on what the FFNs
    before it returned, so that errors of replaced FFNs reach the layers after them as they will at inference.

    Args:
        model: a dense Llama.
        input_ids: calibration text, ``[N, S]``.
        batch_size: blocks per forward pass.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, *, batch_size: int = 16) -> None:
        self._layers = model.model.layers
        captured = [_first_arguments(model, ids.to(model.device)) for ids in input_ids.split(batch_size)]
        self._hidden = [hidden for hidden, _ in captured]
        self._arguments = [arguments for _, arguments in captured]

    @torch.no_grad()
    def ffn_input(self, layer: int) -> Tensor:
        """Input ``[T, D]`` of the FFN of ``layer``; the hidden states advance behind the attention."""
        inputs: list[Tensor] = []
        mlp = self._layers[layer].mlp
        try:
            mlp.forward = _recording(inputs)
            for index, hidden in enumerate(self._hidden):
                output = self._layers[layer](hidden, **self._arguments[index])
                self._hidden[index] = output[0] if isinstance(output, tuple) else output
        finally:
            mlp.__dict__.pop("forward", None)
        return torch.cat(inputs)

    @torch.no_grad()
    def add(self, output_TD: Tensor) -> None:
        """Add an FFN's output ``[T, D]`` to the hidden states."""
        sizes = [hidden.shape[0] * hidden.shape[1] for hidden in self._hidden]
        for hidden, part in zip(self._hidden, output_TD.split(sizes), strict=True):
            hidden += part.view_as(hidden)


def _recording(inputs: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        inputs.append(hidden_states.flatten(0, -2))
        return torch.zeros_like(hidden_states)

    return forward


@torch.no_grad()
def _first_arguments(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Hidden states and keyword arguments that the first decoder layer receives for ``ids [N, S]``."""
    received: list[tuple[Tensor, dict[str, Any]]] = []

    def capture(_: nn.Module, positional: tuple, named: dict[str, Any]) -> None:
        arguments = dict(named)
        hidden = positional[0] if positional else arguments.pop("hidden_states")
        received.append((hidden, arguments))
        raise _Captured

    handle = model.model.layers[0].register_forward_pre_hook(capture, with_kwargs=True)
    try:
        model.model(input_ids=ids, use_cache=False)
    except _Captured:
        pass
    finally:
        handle.remove()
    return received[0]
