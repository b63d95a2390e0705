"""Experts in fused tensors ``gate_up_proj [E, 2H, D]`` and ``down_proj [E, D, H]``, as transformers 5 holds them.

Shape suffixes: T tokens, D hidden width, E experts, K visits per token, N tokens of one expert, H neurons per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from models.moe.layers import ExpertRows, RoutedLayer
from models.moe.routers import tokens_by_expert

_NAMES = ("gate_up_proj", "down_proj")


class FusedLayer(RoutedLayer):
    """Layer whose experts are two tensors."""

    @staticmethod
    def can_view(experts: Any) -> bool:
        """Whether a module holds plain gated FFNs ``[E, 2H, D]`` and ``[E, D, H]`` without biases."""
        shapes = [tuple(getattr(getattr(experts, name, None), "shape", ())) for name in _NAMES]
        if [len(shape) for shape in shapes] != [3, 3] or getattr(experts, "has_bias", False):
            return False
        (_, twice, width), down = shapes
        # Interleaved gate and up rows, or transposed matrices, have other meanings in the same names.
        plain = getattr(experts, "is_concatenated", True) and not getattr(experts, "is_transposed", False)
        # Some families clamp or scale between gate and up.
        gated = getattr(type(experts), "_apply_gate", _default_apply_gate) is _default_apply_gate
        return plain and gated and tuple(down[1:]) == (width, twice // 2) and hasattr(experts, "act_fn")

    @property
    def fused(self) -> bool:
        """True."""
        return True

    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        """``gate_up [2H, D]`` and ``down [D, H]`` of an expert."""
        return self.experts.gate_up_proj[expert], self.experts.down_proj[expert]

    @torch.no_grad()
    def write(self, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """Replace the weights of an expert, cast to the dtype and device of the old ones."""
        self.experts.gate_up_proj[expert] = gate_up.to(self.experts.gate_up_proj)
        self.experts.down_proj[expert] = down.to(self.experts.down_proj)

    def _keep_experts(self, kept: Tensor) -> None:
        for name in _NAMES:
            setattr(self.experts, name, nn.Parameter(getattr(self.experts, name)[kept]))

    @contextmanager
    def observe(self, on_rows: Callable[[ExpertRows], None]) -> Iterator[None]:
        """Context in which each forward pass calls ``on_rows`` for every visited expert, which runs once."""

        def forward(hidden_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
            result_TD, gates = torch.zeros_like(hidden_TD), gates_TK.flatten()
            for expert, places, tokens in tokens_by_expert(experts_TK, self.num_experts):
                inputs_ND = hidden_TD[tokens]
                outputs_ND = self.run(expert, inputs_ND)
                on_rows(ExpertRows(expert, tokens, gates[places], inputs_ND, outputs_ND))
                result_TD.index_add_(0, tokens, (outputs_ND * gates[places, None]).to(result_TD.dtype))
            return result_TD

        # An attribute of the instance hides the method of its class.
        self.experts.forward = forward
        try:
            yield
        finally:
            del self.experts.forward
