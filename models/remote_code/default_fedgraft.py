"""Default output of experts that a token does not visit: a low-rank affine map of the layer's input.

Shape suffixes: T tokens, D hidden width, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DefaultOutput(nn.Module):
    """Estimate of what the experts of one layer that a token does not visit would add to its output.

    ``share * (up @ down @ x + bias)``, where ``share`` is the share of the layer's experts that are not visited: zero
    where all are, so that the layer then computes what it computes without it.

    Args:
        hidden_size: D.
        rank: R, at least 1.

    Attributes:
        down: ``[R, D]``.
        up: ``[D, R]``.
        bias: ``[D]``.
    """

    def __init__(self, *, hidden_size: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, hidden_size))
        self.up = nn.Parameter(torch.zeros(hidden_size, rank))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int) -> Tensor:
        """Default output ``[T, D]`` for the visits ``experts_TK`` (-1: not made) among ``num_experts``."""
        unvisited_T1 = 1 - (experts_TK >= 0).sum(-1, keepdim=True) / num_experts
        estimate_TD = F.linear(F.linear(x_TD, self.down), self.up, self.bias)
        return estimate_TD * unvisited_T1.to(estimate_TD.dtype)
