"""Execution of the visited experts: each runs once, in index order, on the rows of its tokens.

Index order is a topological order of the graph, so that all parents of an expert run before it.

Shape suffixes: T tokens, D hidden width, E experts, K visits per token, H neurons per expert, N (token, visit) pairs,
of which expert e has ``N_e``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .dispatch_fedgraft import Link, Visits


def run_visits(
    x_TD: Tensor,
    weights_TK: Tensor,
    edge_gain_EE: Tensor,
    visits: Visits,
    links: Sequence[Link],
    run: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Weighted sum of the outputs of the visited experts, ``[T, D]``, for any function that runs an expert.

    Args:
        x_TD: input of the layer.
        weights_TK: output weight of each visit.
        edge_gain_EE: share of its source's output that each edge passes.
        visits: visits by expert, from ``dispatch``.
        links: edges that pass information, from ``find_links``.
        run: map from an expert and its rows ``[N_e, D]`` to their outputs.
    """
    outputs: dict[int, Tensor] = {}
    result_TD = torch.zeros_like(x_TD)
    for expert, (places, tokens) in enumerate(zip(*visits, strict=True)):
        if not len(tokens):
            continue
        rows_ND = x_TD[tokens]
        for link in _into(links, expert):
            passed_ND = edge_gain_EE[link.source, expert] * outputs[link.source][link.source_rows]
            rows_ND = rows_ND.index_add(0, link.target_rows, passed_ND.to(rows_ND.dtype))
        outputs[expert] = run(expert, rows_ND)
        weighted_ND = weights_TK.flatten()[places, None] * outputs[expert]
        # No token occurs twice among the rows of an expert, so that the sum has the same order on every device.
        result_TD = result_TD.index_add(0, tokens, weighted_ND.to(x_TD.dtype))
    return result_TD


class FusedExperts(torch.autograd.Function):
    """``run_visits`` for experts in fused tensors, with a manual backward pass.

    Apply to ``(x_TD, weights_TK, edge_gain_EE, gate_up_RHD, down_RDH, visits, links, act_fn, held)``, where row r of
    the fused tensors is expert ``held[r]``. Rows are gathered for one expert at a time, not as a tensor ``[N, D]``, and
    the gradients of the matrices are computed in place.
    """

    @staticmethod
    def forward(ctx: Any, x_TD, weights_TK, edge_gain_EE, gate_up_RHD, down_RDH, visits, links, act_fn, held):
        """Weighted sum of the outputs of the visited experts, ``[T, D]``, and save what the gradients need."""
        dtype, gains = compute_dtype(x_TD), edge_gain_EE.tolist() if links else []
        result_TD, weights = torch.zeros_like(x_TD), weights_TK.flatten()
        runs: dict[int, _Run] = {}
        # One buffer for all experts: allocation takes longer than the products written to it.
        scratch = x_TD.new_empty(max(map(len, visits.token_indices)), x_TD.shape[-1])
        with torch.autocast(x_TD.device.type, enabled=False):
            inputs_TD, rows = x_TD.to(dtype), _visited(held, visits)
            gate_ups, downs = (_cast_rows(weight, rows, dtype) for weight in (gate_up_RHD, down_RDH))
            for row, expert in rows:
                gate_up, down = gate_ups[row], downs[row]
                rows_ND = inputs_TD.index_select(0, visits.token_indices[expert])
                for link in _into(links, expert):
                    passed_ND = runs[link.source].output.index_select(0, link.source_rows)
                    rows_ND.index_add_(0, link.target_rows, passed_ND, alpha=gains[link.source][expert])
                gate_up_NH = rows_ND @ gate_up.T
                output_ND = gated(act_fn, gate_up_NH) @ down.T
                runs[expert] = _Run(rows_ND, gate_up_NH, output_ND, gate_up, down)
                weighted_ND = scratch[: len(output_ND)]
                torch.mul(output_ND, weights[visits.places[expert], None], out=weighted_ND)
                result_TD.index_add_(0, visits.token_indices[expert], weighted_ND)
        ctx.plan, ctx.gains, ctx.experts = (visits, links, act_fn, held), gains, list(runs)
        kept = [tensor for run in runs.values() for tensor in run]
        ctx.save_for_backward(weights_TK, edge_gain_EE, gate_up_RHD, down_RDH, *kept)
        return result_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_result_TD: Tensor):
        """Gradients of the five tensors of floating-point numbers; None for the other arguments."""
        visits, links, _, held = ctx.plan
        back, d_x_TD = _BackwardPass(ctx, d_result_TD), torch.zeros_like(d_result_TD)
        d_inputs: dict[int, Tensor] = {}
        for row, expert in reversed(_visited(held, visits)):
            d_output_ND = back.through_output_weight(expert)
            for link in links:
                if link.source == expert:
                    back.through_link(link, d_inputs[link.target], d_output_ND)
            d_inputs[expert] = back.through_ffn(row, expert, d_output_ND)
            d_x_TD.index_add_(0, visits.token_indices[expert], d_inputs[expert].to(d_x_TD.dtype))
        return (d_x_TD, back.d_weights, back.d_gain, back.d_gate_up, back.d_down) + (None,) * 4


class _Run(NamedTuple):
    """Saved tensors of one expert for the backward pass.

    Its input ``[N_e, D]``, gate and up ``[N_e, 2H]`` and output ``[N_e, D]``, and its matrices in the dtype of the
    products, so that they are cast only once.
    """

    rows: Tensor
    hidden: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor


class _BackwardPass:
    """Gradients of ``FusedExperts``, accumulated over experts in descending order.

    ``d_weights``, ``d_gain``, ``d_gate_up`` and ``d_down`` are None where no gradient is needed.
    """

    def __init__(self, ctx: Any, d_result_TD: Tensor) -> None:
        weights_TK, edge_gain_EE, gate_up, down, *kept = ctx.saved_tensors
        size = len(_Run._fields)
        self._runs = {
            expert: _Run(*kept[size * index : size * (index + 1)]) for index, expert in enumerate(ctx.experts)
        }
        self._visits, _, self._act_fn, held = ctx.plan
        self._gains, self._weights = ctx.gains, weights_TK.flatten()
        self._d_result = d_result_TD.to(kept[0].dtype) if kept else d_result_TD
        needed = ctx.needs_input_grad
        idle = [row for row, expert in enumerate(held) if expert not in self._runs]
        self.d_weights = torch.zeros_like(weights_TK) if needed[1] else None
        self.d_gain = torch.zeros_like(edge_gain_EE) if needed[2] else None
        self.d_gate_up = _empty_but(gate_up, idle) if needed[3] else None
        self.d_down = _empty_but(down, idle) if needed[4] else None

    def through_output_weight(self, expert: int) -> Tensor:
        """Gradient of an expert's output through its weight in the layer's result, ``[N_e, D]``."""
        places, output_ND = self._visits.places[expert], self._runs[expert].output
        d_weighted_ND = self._d_result.index_select(0, self._visits.token_indices[expert])
        if self.d_weights is not None:
            self.d_weights.view(-1)[places] = (d_weighted_ND * output_ND).sum(-1, dtype=self.d_weights.dtype)
        d_output_ND = torch.empty_like(output_ND)
        return torch.mul(d_weighted_ND, self._weights[places, None], out=d_output_ND)

    def through_link(self, link: Link, d_input_ND: Tensor, d_output_ND: Tensor) -> None:
        """Add the gradient of the target's input, times the edge gain, to that of the source's output."""
        d_passed_ND = d_input_ND.index_select(0, link.target_rows)
        if self.d_gain is not None:
            passed_ND = self._runs[link.source].output.index_select(0, link.source_rows)
            self.d_gain[link.source, link.target] = _inner_product(passed_ND, d_passed_ND)
        gain = self._gains[link.source][link.target]
        d_output_ND.index_add_(0, link.source_rows, d_passed_ND, alpha=gain)

    def through_ffn(self, row: int, expert: int, d_output_ND: Tensor) -> Tensor:
        """Gradient of an expert's input, ``[N_e, D]``."""
        run = self._runs[expert]
        with torch.enable_grad():
            gate_up_NH = run.hidden.detach().requires_grad_()
            hidden_NH = gated(self._act_fn, gate_up_NH)
        (d_gate_up_NH,) = torch.autograd.grad(hidden_NH, gate_up_NH, d_output_ND @ run.down)
        if self.d_down is not None:
            _multiply_into(self.d_down[row], d_output_ND.T, hidden_NH.detach())
        if self.d_gate_up is not None:
            _multiply_into(self.d_gate_up[row], d_gate_up_NH.T, run.rows)
        return d_gate_up_NH @ run.gate_up


def gated(act_fn: Callable[[Tensor], Tensor], gate_up_NH: Tensor) -> Tensor:
    """``act(gate) * up`` of ``[N, 2H]``."""
    gate_NH, up_NH = gate_up_NH.chunk(2, -1)
    return act_fn(gate_NH) * up_NH


def gated_ffn(act_fn: nn.Module, rows_ND: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Output ``[N, D]`` of one expert: ``down(act(gate x) * up x)``."""
    return F.linear(gated(act_fn, F.linear(rows_ND, gate_up)), down)


def _into(links: Iterable[Link], expert: int) -> list[Link]:
    return [link for link in links if link.target == expert]


def _visited(held: Sequence[int], visits: Visits) -> list[tuple[int, int]]:
    """Row in the fused tensors and index of every visited expert, sorted by index."""
    return sorted(
        ((row, expert) for row, expert in enumerate(held) if len(visits.token_indices[expert])),
        key=lambda pair: pair[1],
    )


def compute_dtype(x_TD: Tensor) -> torch.dtype:
    """Dtype of the matrix products: that of autocast if enabled, else that of the input."""
    device = x_TD.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype


def _cast_rows(
    weight: Tensor, rows: Sequence[tuple[int, int]], dtype: torch.dtype
) -> Tensor | dict[int, Tensor]:
    """Matrices of the visited experts in ``dtype``, by row; the whole tensor if all are visited."""
    if len(rows) == len(weight):
        return weight.to(dtype)
    return {row: weight[row].to(dtype) for row, _ in rows}


def _empty_but(weight: Tensor, zero_rows: list[int]) -> Tensor:
    """Uninitialized tensor like ``weight`` whose rows ``zero_rows`` are zero."""
    empty = torch.empty_like(weight)
    for row in zero_rows:
        empty[row].zero_()
    return empty


def _inner_product(one: Tensor, other: Tensor) -> Tensor:
    """Inner product of all entries; for 16 bits ``torch.dot`` is many times slower than this sum."""
    if one.element_size() == 2:
        return (one * other).sum(dtype=torch.float32)
    return torch.dot(one.flatten(), other.flatten())


def _multiply_into(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Write ``left @ right`` into ``target``, which may have another dtype."""
    if target.dtype == left.dtype:
        torch.mm(left, right, out=target)
    else:
        target.copy_(left @ right)
