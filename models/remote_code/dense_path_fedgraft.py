"""Wide execution: all experts of a layer as one wide FFN, in which the outputs of unvisited experts are zero.

A row of a small expert takes longer to gather and add than to multiply. What an edge passes is computed in the neurons
of its two experts: their gate and up rows are linear in their input.

Shape suffixes: T tokens, D hidden width, H neurons per expert, E experts, K visits per token, R experts in the fused
tensors, L edges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .execution_fedgraft import gated

# Times in numbers of neurons whose products with a token take as long, measured by ``benchmarks.layer``: to gather and
# add one row of an expert (by the bytes of an entry), and tokens that take as long as the maps of an edge.
_ROW_NEURONS, _EDGE_TOKENS = {2: 160, 4: 48}, 700


def wide_is_faster(
    *, tokens: int, visits: int, experts: int, edges: int, shape: tuple[int, int], dtype: torch.dtype
) -> bool:
    """Whether wide execution takes less time than running each expert on the rows of its tokens.

    Without edges it is where ``tokens * experts * H <= visits * (H + row)``: multiplying the neurons that are not
    visited takes no longer than gathering and adding the rows of those that are.

    Args:
        tokens: number of tokens.
        visits: visits of all tokens together.
        experts: experts in the fused tensors.
        edges: edges that pass information.
        shape: ``(H, D)``.
        dtype: dtype of the matrix products.
    """
    neurons, width = shape
    row = _ROW_NEURONS.get(dtype.itemsize, _ROW_NEURONS[4])
    passing_tokens = visits**2 / max(1, tokens * experts**2)
    by_rows = visits * (neurons + row) + edges * passing_tokens * 0.4 * row
    through_edge = 2 * (1 + 2 * neurons**2 / (3 * width))
    return tokens * experts * neurons + edges * (tokens + _EDGE_TOKENS) * through_edge <= by_rows


def run_wide(
    x_TD: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    edge_gain_EE: Tensor,
    edges: Sequence[tuple[int, int]],
    gate_up_RHD: Tensor,
    down_RDH: Tensor,
    act_fn: Callable[[Tensor], Tensor],
    held: Sequence[int],
) -> Tensor:
    """Weighted sum of the outputs of the visited experts, ``[T, D]``, equal to ``FusedExperts``.

    Args:
        x_TD: input of the layer.
        weights_TK: output weight of each visit.
        experts_TK: visited experts, all of them in ``held``; -1 for visits that are not made.
        edge_gain_EE: share of its source's output that each edge passes.
        edges: source and target of the edges that pass information, sorted by source.
        gate_up_RHD: gate and up projections, ``[R, 2H, D]``.
        down_RDH: down projections.
        act_fn: activation of the gate.
        held: expert of each row of the fused tensors.
    """
    weights_TR = by_expert(experts_TK, weights_TK, len(edge_gain_EE))[:, held]
    gate_up_TRH = F.linear(x_TD, gate_up_RHD.flatten(0, 1)).unflatten(-1, gate_up_RHD.shape[:2])
    if edges:
        made_TE = by_expert(experts_TK, torch.ones_like(weights_TK), len(edge_gain_EE))
        hidden_TRH = _hidden_along_edges(
            gate_up_TRH, made_TE, edge_gain_EE, edges, gate_up_RHD, down_RDH, act_fn, held
        )
    else:
        hidden_TRH = gated(act_fn, gate_up_TRH)
    weighted_TRH = hidden_TRH * weights_TR.unsqueeze(-1).to(hidden_TRH.dtype)
    return _project(weighted_TRH, down_RDH).to(x_TD.dtype)


def by_expert(experts_TK: Tensor, values_TK: Tensor, num_experts: int) -> Tensor:
    """Values of visits by expert, ``[T, E]``; 0 where a token does not visit the expert."""
    columns_TK = torch.where(experts_TK < 0, num_experts, experts_TK)
    empty = values_TK.new_zeros(len(values_TK), num_experts + 1)
    return empty.scatter(1, columns_TK, values_TK)[:, :num_experts]


def _hidden_along_edges(
    gate_up_TRH: Tensor,
    made_TE: Tensor,
    edge_gain_EE: Tensor,
    edges: Sequence[tuple[int, int]],
    gate_up_RHD: Tensor,
    down_RDH: Tensor,
    act_fn: Callable[[Tensor], Tensor],
    held: Sequence[int],
) -> Tensor:
    """Hidden activations ``[T, R, H]``, one expert after the other, with what edges pass to each."""
    hidden: dict[int, Tensor] = {}
    passed: dict[int, Tensor] = {}
    parts = gate_up_TRH.unbind(1)
    maps = _edge_maps(edge_gain_EE, edges, gate_up_RHD, down_RDH, held)
    for expert, row in sorted((expert, row) for row, expert in enumerate(held)):
        gate_up_TH = parts[row]
        if expert in maps:
            sources, map_HH = maps[expert]
            gate_up_TH = gate_up_TH + torch.cat([passed[source] for source in sources], -1) @ map_HH
        hidden[expert] = gated(act_fn, gate_up_TH)
        passed[expert] = hidden[expert] * made_TE[:, expert, None].to(hidden[expert].dtype)
    return torch.stack([hidden[expert] for expert in held], 1)


def _edge_maps(
    edge_gain_EE: Tensor,
    edges: Sequence[tuple[int, int]],
    gate_up_RHD: Tensor,
    down_RDH: Tensor,
    held: Sequence[int],
) -> dict[int, tuple[list[int], Tensor]]:
    """Sources of the edges into each expert, and the map ``[LH, 2H]`` of their hidden rows to its gate and up rows."""
    rows = {expert: row for row, expert in enumerate(held)}
    ends = sorted((target, source) for source, target in edges if source in rows and target in rows)
    if not ends:
        return {}
    targets, sources = (list(each) for each in zip(*ends, strict=True))
    down_LDH, gate_up_LHD = (
        weight.index_select(0, torch.tensor([rows[expert] for expert in chosen], device=weight.device))
        for weight, chosen in ((down_RDH, sources), (gate_up_RHD, targets))
    )
    map_LHH = down_LDH.transpose(1, 2) @ gate_up_LHD.transpose(1, 2)
    map_LHH = map_LHH * edge_gain_EE[sources, targets, None, None].to(map_LHH.dtype)
    starts = [0, *(place for place in range(1, len(ends)) if targets[place] != targets[place - 1]), len(ends)]
    return {
        targets[start]: (sources[start:stop], map_LHH[start:stop].flatten(0, 1))
        for start, stop in pairwise(starts)
    }


def _project(hidden_TRH: Tensor, down_RDH: Tensor) -> Tensor:
    """Sum over experts of their down projections, ``[T, D]``."""
    if len(hidden_TRH) == 1:  # without a copy of the matrices in another order
        return (down_RDH @ hidden_TRH[0].unsqueeze(-1)).squeeze(-1).sum(0, keepdim=True)
    return F.linear(hidden_TRH.flatten(1), down_RDH.transpose(0, 1).flatten(1))
