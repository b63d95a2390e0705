"""The walk: which k experts of a layer a token visits, in which order, and along which edges.

Shape suffixes: T tokens, E experts of the layer, K visits per token. ``-1`` fills visits that a token does not
make because fewer experts can be reached, and parents of visits entered from the router.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Walk(NamedTuple):
    """What the tokens of one layer visited.

    Attributes:
        experts_TK: visited experts in order of visit, int64, -1 where none is left to visit.
        parents_TK: best-scoring visited parent at the time of the visit, int64, -1 if there is none.
        scores_TK: effective scores, differentiable in router scores and affinities; -inf where nothing is visited.
    """

    experts_TK: Tensor
    parents_TK: Tensor
    scores_TK: Tensor


class _State(NamedTuple):
    """What one walk knows between two visits; every tensor is ``[T, E]``."""

    visited: Tensor  # bool
    bonus: Tensor  # largest affinity along an edge from a visited parent; -inf where unreached
    bonus_parent: Tensor  # the parent that gives this affinity
    parent: Tensor  # the visited parent with the highest effective score
    parent_score: Tensor


def walk_graph(
    *,
    scores_TE: Tensor,
    edges_EE: Tensor,
    affinity_EE: Tensor,
    resident_E: Tensor | None,
    num_visits: int,
    order: str = "best-first",
) -> Walk:
    """Let every token visit up to ``num_visits`` experts of one layer.

    Args:
        scores_TE: router scores.
        edges_EE: bool, upper-triangular; the diagonal marks experts that may be entered from the router.
        affinity_EE: added to the score of q when it is reached along p -> q (the best visited parent counts).
        resident_E: bool, the experts that may be visited; None for all.
        num_visits: K.
        order: ``best-first`` visits the best candidate anywhere; ``depth-first`` the best child of the latest
            visit that has one, backtracks when a branch is exhausted, and enters the next root when all are.
    """
    num_experts = scores_TE.shape[-1]
    with torch.no_grad():
        resident_E = torch.ones_like(edges_EE[0]) if resident_E is None else resident_E
        edges_EE = edges_EE & resident_E & resident_E[:, None]
        raw_TE = scores_TE.detach().masked_fill(~resident_E, float("-inf"))
        visits, parents, bonus_parents = _visit(
            raw_TE, edges_EE, affinity_EE.detach(), min(num_visits, num_experts), order
        )
    return Walk(visits, parents, _effective_scores(scores_TE, affinity_EE, visits, bonus_parents))


def _visit(
    raw_TE: Tensor, edges_EE: Tensor, affinity_EE: Tensor, num_visits: int, order: str
) -> tuple[Tensor, Tensor, Tensor]:
    roots_E = edges_EE.diagonal()
    children_EE = edges_EE.triu(1)
    along_EE = affinity_EE.to(raw_TE.dtype).masked_fill(~children_EE, float("-inf"))
    state = _start(raw_TE)
    visits: list[Tensor] = []
    parents: list[Tensor] = []
    bonus_parents: list[Tensor] = []
    for _ in range(num_visits):
        reached = state.bonus > float("-inf")
        effective = torch.where(reached, raw_TE + state.bonus, raw_TE.masked_fill(~roots_E, float("-inf")))
        effective = effective.masked_fill(state.visited, float("-inf"))
        if order == "depth-first" and visits:
            effective = _keep_latest_branch(effective, children_EE, visits)
        choice = effective.argmax(-1, keepdim=True)
        score = effective.gather(-1, choice)
        made = score > float("-inf")
        visits.append(torch.where(made, choice, -1))
        parents.append(torch.where(made, state.parent.gather(-1, choice), -1))
        bonus_parents.append(torch.where(made, state.bonus_parent.gather(-1, choice), -1))
        state = _advance(state, choice, score, made, along_EE)
    return torch.cat(visits, -1), torch.cat(parents, -1), torch.cat(bonus_parents, -1)


def _start(raw_TE: Tensor) -> _State:
    nowhere = torch.full_like(raw_TE, float("-inf"))
    nobody = torch.full(raw_TE.shape, -1, dtype=torch.int64, device=raw_TE.device)
    return _State(torch.zeros_like(raw_TE, dtype=torch.bool), nowhere, nobody, nobody, nowhere)


def _advance(state: _State, choice: Tensor, score: Tensor, made: Tensor, along_EE: Tensor) -> _State:
    """Open the children of the expert just visited; on ties the earlier parent keeps the credit."""
    offered = along_EE[choice.squeeze(-1)].masked_fill(~made, float("-inf"))
    better_bonus = offered > state.bonus
    better_parent = (offered > float("-inf")) & (score > state.parent_score)
    return _State(
        visited=state.visited.scatter(-1, choice, state.visited.gather(-1, choice) | made),
        bonus=torch.where(better_bonus, offered, state.bonus),
        bonus_parent=torch.where(better_bonus, choice, state.bonus_parent),
        parent=torch.where(better_parent, choice, state.parent),
        parent_score=torch.where(better_parent, score, state.parent_score),
    )


def _keep_latest_branch(effective_TE: Tensor, children_EE: Tensor, visits: list[Tensor]) -> Tensor:
    """Leave only the children of the latest visit that still has one; tokens without any keep all (roots).

    Experts off the depth-first stack have no open child left, so the latest visit with an open child is the top of
    the stack that is not exhausted.
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
    """``s_q``, plus the affinity of the edge along which q was reached; -inf where nothing was visited."""
    visited = visits_TK.clamp(min=0)
    bonus = affinity_EE[bonus_parents_TK.clamp(min=0), visited].to(scores_TE.dtype)
    scores = scores_TE.gather(-1, visited) + bonus * (bonus_parents_TK >= 0)
    return scores.masked_fill(visits_TK < 0, float("-inf"))
