"""Expert with the largest gate of each generated token, in one layer of an opened model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from configs.errors import UserError
from models.moe.hooks import observing_experts
from models.moe.layers import ExpertRows, MoELayer
from models.moe.views import moe_layers


@contextmanager
def recording_experts(model: PreTrainedModel, layer: int) -> Iterator[list[int]]:
    """Record, for each forward pass in the block, the expert with the largest gate of the pass's last token.

    Shared experts, which every token visits, do not count.

    Args:
        model: model with experts; of another nothing is recorded.
        layer: index among the layers with experts; a model with fewer takes its last.

    Yields:
        The list of experts, which grows by one with every forward pass.
    """
    found: list[int] = []
    try:
        layers = moe_layers(model)
    except UserError:
        yield found
        return
    recorder = _Recorder(layers[min(layer, len(layers) - 1)], found)
    handle = model.register_forward_hook(lambda *_: recorder.end())
    try:
        with observing_experts([recorder.layer], recorder.add):
            yield found
    finally:
        handle.remove()


class _Recorder:
    """Gates of the last token of a forward pass, expert by expert."""

    def __init__(self, layer: MoELayer, found: list[int]) -> None:
        self.layer = layer
        self._found = found
        self._rows: list[tuple[int, float, int]] = []

    def add(self, layer: MoELayer, rows: ExpertRows) -> None:
        if rows.expert >= layer.num_shared and len(rows.tokens):
            last = int(rows.tokens.argmax())
            self._rows.append((int(rows.tokens[last]), float(rows.gates[last]), rows.expert))

    def end(self) -> None:
        self._found.append(max(self._rows)[2] if self._rows else -1)
        self._rows.clear()
