"""What each expert of an opened model receives and gives, told while the model runs.

Shape suffixes: T tokens, D hidden width, K visits per token, N tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from configs.errors import UserError
from models.moe.routers import route, router_logits
from models.moe.views import MoELayer
from models.remote_code.dispatch_fedgraft import Visits, sort_visits
from models.remote_code.execution_fedgraft import gated_ffn
from models.remote_code.experts_fedgraft import ExpertGraphMLP, ExpertStorage
from models.remote_code.routing_fedgraft import Walk


class ExpertRows(NamedTuple):
    """One expert in one forward pass.

    Attributes:
        expert: number.
        tokens: ``[N]``, those that visit it, as positions in the flattened batch.
        gates: ``[N]``, what multiplies its output.
        inputs: ``[N, D]``, what it receives, in a graph with what passes along edges.
        outputs: ``[N, D]``, before the gates.
    """

    expert: int
    tokens: Tensor
    gates: Tensor
    inputs: Tensor
    outputs: Tensor


OnRows = Callable[[MoELayer, ExpertRows], None]


@contextmanager
def observing(layers: Sequence[MoELayer], on_rows: OnRows) -> Iterator[None]:
    """While the block lasts, call ``on_rows`` for every expert that a forward pass of the model visits.

    The model computes what it computes otherwise, to rounding, and experts run once; only those that are modules of
    their own run a second time for the observer.

    Raises:
        UserError: in the forward pass, where experts that are modules run on other numbers of tokens than the kind
            of their router says.
    """
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_observing(layer, on_rows))
        yield


def _observing(layer: MoELayer, on_rows: OnRows) -> Any:
    if isinstance(layer.experts, ExpertGraphMLP):
        return _observing_graph(layer, layer.experts, on_rows)
    return _observing_fused(layer, on_rows) if layer.fused else _observing_modules(layer, on_rows)


@contextmanager
def _observing_fused(layer: MoELayer, on_rows: OnRows) -> Iterator[None]:
    def forward(hidden_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        result_TD, gates = torch.zeros_like(hidden_TD), gates_TK.flatten()
        for expert, places, tokens in _visited(sort_visits(experts_TK, layer.num_experts)):
            inputs_ND = hidden_TD[tokens]
            outputs_ND = layer.run(expert, inputs_ND)
            on_rows(layer, ExpertRows(expert, tokens, gates[places], inputs_ND, outputs_ND))
            result_TD.index_add_(0, tokens, (outputs_ND * gates[places, None]).to(result_TD.dtype))
        return result_TD

    # An attribute of the instance hides the method of its class.
    layer.experts.forward = forward
    try:
        yield
    finally:
        del layer.experts.forward


@contextmanager
def _observing_modules(layer: MoELayer, on_rows: OnRows) -> Iterator[None]:
    counted = [0] * layer.num_experts

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_TD = inputs[0].flatten(0, -2)
        experts_TK, gates_TK = route(layer, router_logits(layer, x_TD))
        gates = gates_TK.flatten().to(x_TD.dtype)
        expected = [0] * layer.num_experts
        for expert, places, tokens in _visited(sort_visits(experts_TK, layer.num_experts)):
            inputs_ND = x_TD[tokens]
            outputs_ND = layer.run(expert, inputs_ND)
            on_rows(layer, ExpertRows(expert, tokens, gates[places], inputs_ND, outputs_ND))
            expected[expert] = len(tokens)
        counted[:] = expected

    def counting(expert: int) -> Callable:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counted[expert] -= inputs[0].flatten(0, -2).shape[0]

        return hook

    def after(*_: Any) -> None:
        if any(counted):
            raise UserError(
                f"expected the router of decoder layer {layer.decoder} to be {layer.kind}, but its experts ran on "
                "other tokens; this model's routing is not supported"
            )

    hooks = [layer.block.register_forward_pre_hook(before), layer.block.register_forward_hook(after)]
    hooks += [each.register_forward_pre_hook(counting(index)) for index, each in enumerate(layer.experts)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Observed:
    """Storage of a graph's layer that runs experts from where they were and tells the observer."""

    def __init__(self, layer: MoELayer, block: ExpertGraphMLP, on_rows: OnRows) -> None:
        self._layer, self._block, self._on_rows = layer, block, on_rows
        self._before: ExpertStorage | None = block.storage
        self._visits: Visits | None = None
        self._weights = torch.empty(0)

    def walked(self, block: ExpertGraphMLP, scores: Tensor, walk: Walk, weights_TK: Tensor) -> None:
        """Where the tokens of this forward pass go."""
        self._visits, self._weights = sort_visits(walk.experts_TK, block.num_experts), weights_TK.flatten()

    def run(self, expert: int, rows_ND: Tensor) -> Tensor:
        outputs_ND = self._run(expert, rows_ND)
        assert self._visits is not None
        places, tokens = self._visits.places[expert], self._visits.tokens[expert]
        self._on_rows(self._layer, ExpertRows(expert, tokens, self._weights[places], rows_ND, outputs_ND))
        return outputs_ND

    def _run(self, expert: int, rows_ND: Tensor) -> Tensor:
        if self._before is not None:
            return self._before.run(expert, rows_ND)
        row = self._block.held.index(expert)
        block = self._block
        return gated_ffn(block.act_fn, rows_ND, block.gate_up_proj[row], block.down_proj[row])

    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        with _storage(self._block, self._before):
            return self._block.read_expert(expert)

    def write(self, expert: int, gate_up: Tensor, down: Tensor) -> None:
        with _storage(self._block, self._before):
            self._block.write_expert(expert, gate_up, down)


@contextmanager
def _observing_graph(layer: MoELayer, block: ExpertGraphMLP, on_rows: OnRows) -> Iterator[None]:
    observed = _Observed(layer, block, on_rows)
    block.observers.append(observed.walked)
    try:
        with _storage(block, observed):
            yield
    finally:
        block.observers.remove(observed.walked)


@contextmanager
def _storage(block: ExpertGraphMLP, storage: ExpertStorage | None) -> Iterator[None]:
    before, block.storage = block.storage, storage
    try:
        yield
    finally:
        block.storage = before


def _visited(visits: Visits) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, places and tokens of each expert that is visited at all."""
    for expert, (places, tokens) in enumerate(zip(*visits, strict=True)):
        if len(tokens):
            yield expert, places, tokens
