"""Experts in a list of modules, as remote code and older versions of transformers hold them.

Shape suffixes: T tokens, D hidden width, K visits per token, N tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from configs.errors import UserError
from models.families.family import MoEFamily
from models.moe.layers import ExpertRows, RoutedLayer
from models.moe.routers import route, router_logits, tokens_by_expert


class ModuleLayer(RoutedLayer):
    """Layer whose experts are modules of three projections."""

    @staticmethod
    def can_view(experts: Any, family: MoEFamily) -> bool:
        """Whether a module is a list of gated FFNs without biases."""
        return isinstance(experts, nn.ModuleList) and all(
            _projections(expert, family) is not None and hasattr(expert, "act_fn") for expert in experts
        )

    @property
    def act_fn(self) -> nn.Module:
        """Activation function of the gate."""
        return cast(nn.Module, self.experts[0].act_fn)

    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        """``gate_up [2H, D]`` and ``down [D, H]`` of an expert."""
        gate, up, down = self._linears(expert)
        return torch.cat([gate.weight, up.weight]), down.weight

    @torch.no_grad()
    def write(self, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """Replace the weights of an expert, cast to the dtype and device of the old ones."""
        for linear, value in zip(self._linears(expert), (*gate_up.chunk(2), down), strict=True):
            linear.weight.copy_(value)

    def _linears(self, expert: int) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return cast(tuple, _projections(self.experts[expert], self.family))

    def _keep_experts(self, kept: Tensor) -> None:
        setattr(
            self.block, self.family.experts, nn.ModuleList(self.experts[expert] for expert in kept.tolist())
        )

    @contextmanager
    def observe(self, on_rows: Callable[[ExpertRows], None]) -> Iterator[None]:
        """Context in which each forward pass calls ``on_rows`` for every visited expert, which runs a second time.

        Raises:
            UserError: in the forward pass, where experts run on other numbers of tokens than the router kind implies.
        """
        unexplained = [0] * self.num_experts

        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_TD = inputs[0].flatten(0, -2)
            experts_TK, gates_TK = route(self, router_logits(self, x_TD))
            gates = gates_TK.flatten().to(x_TD.dtype)
            unexplained[:] = [0] * self.num_experts
            for expert, places, tokens in tokens_by_expert(experts_TK, self.num_experts):
                inputs_ND = x_TD[tokens]
                outputs_ND = self.run(expert, inputs_ND)
                on_rows(ExpertRows(expert, tokens, gates[places], inputs_ND, outputs_ND))
                unexplained[expert] = len(tokens)

        with _token_counts(self, unexplained, before):
            yield


@contextmanager
def _token_counts(layer: ModuleLayer, unexplained: list[int], before: Callable) -> Iterator[None]:
    """Hooks that subtract each expert's tokens from ``unexplained`` and refuse a rest after the block."""

    def count(expert: int) -> Callable:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            unexplained[expert] -= inputs[0].flatten(0, -2).shape[0]

        return hook

    def after(*_: Any) -> None:
        if any(unexplained):
            raise UserError(
                f"expected the router of decoder layer {layer.decoder} to be {layer.kind}, but its experts ran on "
                "other tokens; this model's routing is not supported"
            )

    hooks = [layer.block.register_forward_pre_hook(before), layer.block.register_forward_hook(after)]
    hooks += [each.register_forward_pre_hook(count(index)) for index, each in enumerate(layer.experts)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _projections(expert: nn.Module, family: MoEFamily) -> tuple[nn.Linear, nn.Linear, nn.Linear] | None:
    """Gate, up and down projection of an expert; None where it has other modules."""
    for names in family.matrices:
        linears = [getattr(expert, name, None) for name in names]
        if all(isinstance(linear, nn.Linear) and linear.bias is None for linear in linears):
            return cast(tuple, tuple(linears))
    return None
