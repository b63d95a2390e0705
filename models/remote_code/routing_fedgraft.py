"""Walk of tokens over an expert graph: the k experts that each token visits, their order and parents.

Shape suffixes: T tokens, E experts of the layer, K visits per token. ``-1`` fills visits that a token does not
make because fewer experts can be reached, and parents of visits entered from the router.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Selection score of a shared expert: above every logit, and finite, so that sums with -inf are -inf.
SHARED_SCORE = torch.finfo(torch.float32).max / 4


class Walk(NamedTuple):
    """Visits of the tokens of one layer.

    Attributes:
        experts_TK: visited experts in order of visit, int64; -1 if none is left to visit.
        parents_TK: best-scoring visited parent at the time of the visit, int64; -1 if there is none.
        scores_TK: effective scores, differentiable in router logits and affinities; -inf for visits not made.
    """

    experts_TK: Tensor
    parents_TK: Tensor
    scores_TK: Tensor


def walk_graph(
    *,
    scores_TE: Tensor,
    edges_EE: Tensor,
    affinity_EE: Tensor,
    resident_E: Tensor | None,
    num_visits: int,
    order: str = "best-first",
    num_shared: int = 0,
) -> Walk:
    """Choose up to ``num_visits`` experts of one layer for every token.

    Args:
        scores_TE: router logits.
        edges_EE: bool, upper-triangular; the diagonal marks experts that may be entered from the router.
        affinity_EE: added to the score of q when it is reached along p -> q (the best visited parent counts).
        resident_E: bool, the experts that may be visited; None for all.
        num_visits: K.
        order: ``best-first`` visits the best candidate anywhere; ``depth-first`` the best child of the latest
            visit that has one, backtracks when a branch is exhausted, and enters the next root when all are.
        num_shared: shared experts, the first of the layer, which are visited before all others.
    """
    with torch.no_grad():
        top_k = order == "best-first" and is_top_k(edges_EE, affinity_EE, resident_E)
        resident_E = torch.ones_like(edges_EE[0]) if resident_E is None else resident_E
        raw_TE = selection_scores(scores_TE.detach(), num_shared).masked_fill(~resident_E, float("-inf"))
        edges_EE = edges_EE & resident_E & resident_E[:, None]
        children_EE = edges_EE.triu(1)
        along_EE = affinity_EE.detach().to(raw_TE.dtype).masked_fill(~children_EE, float("-inf"))
        num_visits = min(num_visits, scores_TE.shape[-1])
        if top_k:
            visits_TK = _top_k(raw_TE, num_visits)
            # In the order of scores and with equal affinities the earliest parent is the best by both.
            parents_TK = openers_TK = _earliest_parent(children_EE, visits_TK)
        else:
            visits_TK, made_TK = _visit(raw_TE, edges_EE.diagonal(), along_EE, num_visits, order, num_shared)
            parents_TK = _best_earlier(made_TK[:, :, None].expand(-1, -1, num_visits), children_EE, visits_TK)
            offered_TKK = along_EE[visits_TK[:, :, None], visits_TK[:, None]]
            openers_TK = _best_earlier(offered_TKK, children_EE, visits_TK)
    return Walk(visits_TK, parents_TK, _effective_scores(scores_TE, affinity_EE, visits_TK, openers_TK))


def selection_scores(scores_TE: Tensor, num_shared: int) -> Tensor:
    """Scores that the walk compares: router logits, and ``SHARED_SCORE`` for the first ``num_shared`` experts."""
    if not num_shared:
        return scores_TE
    shared_E = torch.arange(scores_TE.shape[-1], device=scores_TE.device) < num_shared
    return scores_TE.masked_fill(shared_E, SHARED_SCORE)


def is_top_k(edges_EE: Tensor, affinity_EE: Tensor, resident_E: Tensor | None) -> bool:
    """Whether a best-first walk equals top-k: every resident is a root, and no edge has an affinity."""
    counts_EE, roots_E = edges_EE.triu(1) & (affinity_EE != 0), edges_EE.diagonal()
    if resident_E is None:
        return bool(roots_E.all() & ~counts_EE.any())
    counts_EE &= resident_E & resident_E[:, None]
    return bool((roots_E | ~resident_E).all() & ~counts_EE.any())


def _top_k(raw_TE: Tensor, num_visits: int) -> Tensor:
    """Top-k experts in descending order of score, the lower index first on ties; -1 if there are fewer."""
    scores_TE, experts_TE = raw_TE.sort(dim=-1, descending=True, stable=True)
    return experts_TE[:, :num_visits].where(scores_TE[:, :num_visits] > float("-inf"), -1)


def _earliest_parent(children_EE: Tensor, visits_TK: Tensor) -> Tensor:
    """Parent of every visit that was visited first, ``[T, K]``; -1 if no edge leads from an earlier visit to it."""
    (tokens, visits), experts = visits_TK.shape, len(children_EE)
    columns_TK = torch.where(visits_TK < 0, experts, visits_TK)
    order_TK = torch.arange(visits, device=visits_TK.device).expand(tokens, -1)
    # Position of each expert among the visits; the last column belongs to visits that are not made.
    position_TE = (
        torch.full_like(visits_TK[:, :1], visits).repeat(1, experts + 1).scatter(1, columns_TK, order_TK)
    )
    sources_L, targets_L = children_EE.nonzero().unbind(-1)
    first_TE = torch.full_like(position_TE, visits).scatter_reduce(
        1, targets_L.expand(tokens, -1), position_TE[:, sources_L], "amin"
    )
    first_TK = first_TE.gather(1, columns_TK)
    parents_TK = visits_TK.gather(1, first_TK.clamp(max=visits - 1))
    return parents_TK.where(first_TK < order_TK, -1)


def _visit(
    raw_TE: Tensor, roots_E: Tensor, along_EE: Tensor, num_visits: int, order: str, num_shared: int
) -> tuple[Tensor, Tensor]:
    """Sequential walk: experts ``[T, K]`` and their effective scores; -1 and -inf for visits not made."""
    unreached_E = torch.zeros_like(along_EE[0]).masked_fill(~roots_E, float("-inf"))
    # The last row, index -1, belongs to visits that are not made and opens no child.
    opened_EE = torch.cat([along_EE, torch.full_like(along_EE[:1], float("-inf"))])
    bonus_TE = torch.full_like(raw_TE, float("-inf"))
    left_TE = raw_TE.clone()
    visits: list[Tensor] = []
    scores: list[Tensor] = []
    for _ in range(num_visits):
        effective_TE = left_TE + torch.where(bonus_TE.isneginf(), unreached_E, bonus_TE)
        if order == "depth-first" and len(visits) >= max(num_shared, 1):
            effective_TE = _keep_latest_branch(effective_TE, ~along_EE.isneginf(), visits)
        score, choice = effective_TE.max(-1, keepdim=True)
        visit = choice.where(score > float("-inf"), -1)
        left_TE.scatter_(-1, choice, float("-inf"))
        bonus_TE = torch.maximum(bonus_TE, opened_EE[visit.squeeze(-1)])
        visits.append(visit)
        scores.append(score)
    return torch.cat(visits, -1), torch.cat(scores, -1)


def _best_earlier(value_TKK: Tensor, children_EE: Tensor, visits_TK: Tensor) -> Tensor:
    """Parent of every visit among the earlier ones, by largest ``value[t, parent, visit]``, ``[T, K]``.

    The earlier parent on ties; -1 if no edge leads from an earlier visit to it.
    """
    joined_TKK = children_EE[visits_TK[:, :, None], visits_TK[:, None]]
    made_TK = visits_TK >= 0
    joined_TKK = (joined_TKK & made_TK[:, :, None] & made_TK[:, None]).triu(1)
    best = value_TKK.masked_fill(~joined_TKK, float("-inf")).max(1)
    return visits_TK.gather(-1, best.indices).where(joined_TKK.any(1), -1)


def _keep_latest_branch(effective_TE: Tensor, children_EE: Tensor, visits: list[Tensor]) -> Tensor:
    """Mask all candidates but the open children of the latest visit that has one; keep all if no visit has one.

    Experts off the depth-first stack have no open child, so the latest visit with an open child is the top of the
    stack.
    """
    visits_TK = torch.cat(visits, -1).flip(-1)
    open_TKE = children_EE[visits_TK] & (effective_TE > float("-inf"))[:, None]
    open_TKE &= (visits_TK >= 0)[..., None]
    has_child_TK = open_TKE.any(-1)
    latest = has_child_TK.to(torch.uint8).argmax(-1)
    branch_TE = open_TKE[torch.arange(len(latest), device=latest.device), latest]
    keep_TE = branch_TE | ~has_child_TK.any(-1, keepdim=True)
    return effective_TE.masked_fill(~keep_TE, float("-inf"))


def _effective_scores(
    scores_TE: Tensor, affinity_EE: Tensor, visits_TK: Tensor, bonus_parents_TK: Tensor
) -> Tensor:
    """Router logit plus the affinity of the edge that reached the expert; -inf for visits not made."""
    visited = visits_TK.clamp(min=0)
    bonus = affinity_EE[bonus_parents_TK.clamp(min=0), visited].to(scores_TE.dtype)
    scores = scores_TE.gather(-1, visited) + bonus * (bonus_parents_TK >= 0)
    return scores.masked_fill(visits_TK < 0, float("-inf"))
