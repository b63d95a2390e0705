"""Dispatch of tokens to experts: visits sorted by expert, and the edges along which tokens pass information.

Shape suffixes: T tokens, E experts, K visits per token, N (token, visit) pairs, L edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Visits(NamedTuple):
    """Visits of all tokens, sorted by expert.

    Attributes:
        places: per expert, indices of its visits in the flattened ``[T, K]``, ascending.
        token_indices: per expert, indices of the tokens that visit it, ascending.
    """

    places: Sequence[Tensor]
    token_indices: Sequence[Tensor]


class Link(NamedTuple):
    """Edge along which at least one token passes information.

    Attributes:
        source: expert that passes its output.
        target: expert that receives it.
        source_rows: positions in the source's ``token_indices`` of the tokens that visit both.
        target_rows: positions of the same tokens in the target's ``token_indices``.
    """

    source: int
    target: int
    source_rows: Tensor
    target_rows: Tensor


def dispatch(experts_TK: Tensor, num_experts: int) -> Visits:
    """Sort visits ``[T, K]`` by expert; ``-1`` marks a visit that is not made."""
    flat = experts_TK.flatten() + 1
    unmade, *counts = torch.bincount(flat, minlength=num_experts + 1).tolist()
    places_N = flat.argsort(stable=True)[unmade:]
    return Visits(places_N.split(counts), (places_N // experts_TK.shape[-1]).split(counts))


def find_links(visits: Visits, edges_EE: Tensor, num_tokens: int) -> list[Link]:
    """Links of the edges (bool, strictly upper-triangular) whose ends share a token, by source, then target."""
    edges = edges_EE.nonzero()
    if not len(edges):
        return []
    rows_ET = _rows_by_token(visits, len(edges_EE), num_tokens)
    sources_LT, targets_LT = rows_ET[edges[:, 0]], rows_ET[edges[:, 1]]
    joined_LT = (sources_LT >= 0) & (targets_LT >= 0)
    counts = joined_LT.sum(-1).tolist()
    rows = zip(sources_LT[joined_LT].split(counts), targets_LT[joined_LT].split(counts), strict=True)
    return [
        Link(source, target, *both)
        for (source, target), both, count in zip(edges.tolist(), rows, counts, strict=True)
        if count
    ]


def _rows_by_token(visits: Visits, num_experts: int, num_tokens: int) -> Tensor:
    """Position of each token in each expert's ``token_indices``, ``[E, T]``; -1 if it does not visit the expert."""
    tokens_N = torch.cat(list(visits.token_indices))
    counts_E = torch.tensor([len(tokens) for tokens in visits.token_indices])
    experts_N = torch.arange(num_experts).repeat_interleave(counts_E)
    rows_N = torch.arange(len(tokens_N)) - (counts_E.cumsum(0) - counts_E)[experts_N]
    rows_ET = torch.full((num_experts, num_tokens), -1, device=tokens_N.device)
    rows_ET[experts_N.to(tokens_N.device), tokens_N] = rows_N.to(tokens_N.device)
    return rows_ET
