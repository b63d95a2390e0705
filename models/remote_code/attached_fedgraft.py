"""Visits of attached experts: made in addition to the k of a token, wherever an expert with an edge to them is visited.

An expert that was added with a down projection of zero changes no output while it is attached, and learns from the
tokens of its parent. Shape suffixes: T tokens, E experts, K visits per token, A attached experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .routing_fedgraft import Walk


def chosen_experts(resident_E: Tensor | None, attached: list[int], like_E: Tensor) -> Tensor | None:
    """Experts that the walk may choose, bool ``[E]``: residents that are not attached; None for all.

    Args:
        resident_E: bool; None for all.
        attached: attached experts.
        like_E: tensor of E entries on the device of the result.
    """
    if not attached:
        return resident_E
    chosen_E = torch.ones_like(like_E, dtype=torch.bool) if resident_E is None else resident_E.clone()
    chosen_E[attached] = False
    return chosen_E


def with_attached(
    walk: Walk,
    weights_TK: Tensor,
    *,
    scores_TE: Tensor,
    edges_EE: Tensor,
    attached: list[int],
    resident_E: Tensor | None,
) -> tuple[Walk, Tensor]:
    """Append the visits of attached experts, with an output weight of 1: ``[T, K + A]``.

    Args:
        walk: walk over the other experts.
        weights_TK: its output weights.
        scores_TE: router logits.
        edges_EE: bool, the edges of the layer.
        attached: attached experts, ascending.
        resident_E: bool, the experts that may be visited; None for all.
    """
    from_EA = edges_EE[:, attached]
    # -1, a visit that is not made, is the last row of the padded table.
    from_EA = torch.cat([from_EA, torch.zeros_like(from_EA[:1])])
    offered_TKA = from_EA[walk.experts_TK]
    made_TA = offered_TKA.any(1)
    if resident_E is not None:
        made_TA = made_TA & resident_E[attached]
    attached_A = torch.tensor(attached, device=scores_TE.device)
    experts_TA = attached_A.expand_as(made_TA).where(made_TA, -1)
    first_TA = offered_TKA.to(torch.uint8).argmax(1)
    parents_TA = walk.experts_TK.gather(1, first_TA).where(made_TA, -1)
    scores_TA = scores_TE[:, attached].to(walk.scores_TK.dtype).masked_fill(~made_TA, float("-inf"))
    longer = Walk(
        torch.cat([walk.experts_TK, experts_TA], -1),
        torch.cat([walk.parents_TK, parents_TA], -1),
        torch.cat([walk.scores_TK, scores_TA], -1),
    )
    return longer, torch.cat([weights_TK, torch.ones_like(scores_TA, dtype=weights_TK.dtype)], -1)
