"""Default output of experts that a token does not visit: a low-rank affine map of the layer's input.

Shape suffixes: T tokens, D hidden width, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DefaultOutput(nn.Module):
    """Estimate of what the experts of one layer that a token does not visit would add to its output.

    ``share * (up @ down @ x + bias)``, where ``share`` is the share of unvisited experts among those that the output
    was fitted for: zero where a token visits all of them. Experts that were removed from the layer since then count as
    unvisited, so that the output stands for them, too.

    Args:
        hidden_size: D.
        rank: R, at least 1.
        num_experts: number of experts of the layer when the output was fitted.

    Attributes:
        down: ``[R, D]``.
        up: ``[D, R]``.
        bias: ``[D]``.
    """

    def __init__(self, *, hidden_size: int, rank: int, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.down = nn.Parameter(torch.empty(rank, hidden_size))
        self.up = nn.Parameter(torch.zeros(hidden_size, rank))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x_TD: Tensor, experts_TK: Tensor) -> Tensor:
        """Default output ``[T, D]`` for the visits ``experts_TK`` (-1: not made)."""
        unvisited_T1 = 1 - (experts_TK >= 0).sum(-1, keepdim=True) / self.num_experts
        estimate_TD = F.linear(F.linear(x_TD, self.down), self.up, self.bias)
        return estimate_TD * unvisited_T1.to(estimate_TD.dtype)
