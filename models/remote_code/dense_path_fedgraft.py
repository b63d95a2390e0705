"""Dense path: one wide FFN for experts that every token visits, with no information passed between them.

Shape suffixes: T tokens, D hidden width, H neurons per expert, R experts in the fused tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch_fedgraft import Visits
from .execution_fedgraft import gated


def all_visit(visits: Visits, held: Sequence[int], num_tokens: int) -> bool:
    """Whether each of ``num_tokens`` tokens visits every expert of ``held``."""
    return all(len(visits.token_indices[expert]) == num_tokens for expert in held)


def run_all_visited(
    x_TD: Tensor,
    weights_TK: Tensor,
    visits: Visits,
    gate_up_RHD: Tensor,
    down_RDH: Tensor,
    act_fn: Callable[[Tensor], Tensor],
    held: Sequence[int],
) -> Tensor:
    """Weighted sum of all experts' outputs, ``[T, D]``, equal to ``FusedExperts`` without links."""
    weights_TR = torch.stack([weights_TK.flatten()[visits.places[expert]] for expert in held], -1)
    gate_up_TRH = F.linear(x_TD, gate_up_RHD.flatten(0, 1)).unflatten(-1, gate_up_RHD.shape[:2])
    hidden_TRH = gated(act_fn, gate_up_TRH)
    weighted_TRH = hidden_TRH * weights_TR.unsqueeze(-1).to(hidden_TRH.dtype)
    return F.linear(weighted_TRH.flatten(1), down_RDH.transpose(0, 1).flatten(1)).to(x_TD.dtype)
