"""One layer of an expert graph: fused expert weights, and their execution in the order of the edges.

Shape suffixes: T tokens, D hidden width, E experts, K visits per token, H neurons per expert, N (token, visit) pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .routing_fedgraft import Walk, walk_graph


class ExpertGraphMLP(nn.Module):
    """A graph of experts in place of a dense gated FFN.

    Args:
        hidden_size: D.
        expert_size: H.
        num_experts: E.
        num_visits: experts that each token visits, K.
        activation: name of the gate's activation, as Hugging Face knows it.
        order: ``best-first`` or ``depth-first`` (see ``walk_graph``).
        layer_index: of the decoder layer, for messages.

    Attributes:
        resident: bool ``[E]`` on the layer's device, the experts that may be visited; None for all.
        residency_gate: ``[E]``, or None. While a mask is learned: multiplies each expert's output and lets every token
            also compute its best non-resident expert, so that both sides of the budget receive a gradient.
        observer: called with ``(layer, scores [T, E], walk, output_weights [T, K])`` after each forward, or None.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        num_visits: int,
        activation: str = "silu",
        order: str = "best-first",
        layer_index: int = 0,
    ):
        super().__init__()
        self.num_visits, self.order, self.layer_index = num_visits, order, layer_index
        self.act_fn = ACT2FN[activation]
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        self.router = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.edge_gain = nn.Parameter(torch.zeros(num_experts, num_experts))
        self.edge_affinity = nn.Parameter(torch.zeros(num_experts, num_experts))
        self.output_gain = nn.Parameter(torch.zeros(num_experts))
        self.register_buffer("edges", torch.eye(num_experts, dtype=torch.bool))
        self.register_buffer("neurons", torch.arange(num_experts * expert_size).view(num_experts, -1))
        self.resident: Tensor | None = None
        self.residency_gate: Tensor | None = None
        self.observer: Callable[[ExpertGraphMLP, Tensor, Walk, Tensor], None] | None = None

    @property
    def num_experts(self) -> int:
        """E of this layer."""
        return self.router.shape[0]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``.

        Raises:
            FloatingPointError: a router score is not finite.
        """
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores_TE = self.score(x_TD)
        walk = walk_graph(
            scores_TE=scores_TE,
            edges_EE=self.edges,
            affinity_EE=self.edge_affinity,
            resident_E=self.resident,
            num_visits=self.num_visits,
            order=self.order,
        )
        weights_TK = self._output_weights(walk)
        if self.observer is not None:
            self.observer(self, scores_TE.detach(), walk, weights_TK.detach())
        experts_TK = walk.experts_TK
        if self.residency_gate is not None:
            experts_TK, weights_TK = self._with_runner_up(scores_TE, experts_TK, weights_TK)
        return self._execute(x_TD, experts_TK, weights_TK).view_as(hidden_states)

    def score(self, x_TD: Tensor) -> Tensor:
        """Router scores ``[T, E]``, at least in fp32: rounding must not decide which expert is visited."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TE = F.linear(x_TD.to(wide), self.router.to(wide))
        if not torch.isfinite(scores_TE).all():
            raise FloatingPointError(
                f"router scores of layer {self.layer_index} are not finite: its input or its router holds NaN or Inf"
            )
        return scores_TE

    def _output_weights(self, walk: Walk) -> Tensor:
        made_TK = walk.experts_TK >= 0
        lowest = torch.finfo(walk.scores_TK.dtype).min
        share_TK = torch.softmax(walk.scores_TK.masked_fill(~made_TK, lowest), -1) * made_TK
        return 1 + self.output_gain[walk.experts_TK.clamp(min=0)].to(share_TK.dtype) * share_TK

    def _with_runner_up(
        self, scores_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        runner_up = torch.full_like(experts_TK[:, :1], -1)
        if self.resident is not None and not self.resident.all():
            outside_TE = scores_TE.detach().masked_fill(self.resident, float("-inf"))
            runner_up = outside_TE.argmax(-1, keepdim=True)
        experts = torch.cat([experts_TK, runner_up], -1)
        weights = torch.cat([weights_TK, torch.ones_like(weights_TK[:, :1])], -1)
        return experts, weights * self.residency_gate[experts.clamp(min=0)]

    def _execute(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        experts_TK, by_index = torch.where(experts_TK < 0, self.num_experts, experts_TK).sort(-1)
        weights_TK = weights_TK.gather(-1, by_index)
        edges_EE = self._passing_edges()
        if edges_EE is None and bool((experts_TK < self.num_experts).all()):
            rows_ND = x_TD.repeat_interleave(experts_TK.shape[-1], 0)
            outputs_TKD = self._grouped_ffn(rows_ND, experts_TK.flatten()).view(
                *experts_TK.shape, x_TD.shape[-1]
            )
        else:
            outputs_TKD = self._execute_in_steps(x_TD, experts_TK, edges_EE)
        return torch.einsum("tk,tkd->td", weights_TK.to(outputs_TKD.dtype), outputs_TKD).to(x_TD.dtype)

    def _execute_in_steps(self, x_TD: Tensor, experts_TK: Tensor, edges_EE: Tensor | None) -> Tensor:
        """Outputs ``[T, K, D]``; a visit runs one step after the last of its visited parents."""
        if edges_EE is None:
            edges_EE = torch.zeros_like(self.edges)
        active_TKK = _between_visits(edges_EE, experts_TK)
        gains_TKK = _between_visits(self.edge_gain * edges_EE, experts_TK).to(x_TD.dtype)
        steps_TK = execution_steps(active_TKK, experts_TK < self.num_experts)
        outputs_TKD = x_TD.new_zeros(*experts_TK.shape, x_TD.shape[-1])
        for step in range(int(steps_TK.max()) + 1 if steps_TK.numel() else 0):
            pairs = (steps_TK == step).nonzero(as_tuple=True)
            inputs_ND = x_TD[pairs[0]]
            if step > 0:
                inputs_ND = inputs_ND + torch.einsum("tij,tid->tjd", gains_TKK, outputs_TKD)[pairs]
            results_ND = self._grouped_ffn(inputs_ND, experts_TK[pairs])
            outputs_TKD = outputs_TKD.index_put(pairs, results_ND.to(outputs_TKD.dtype))
        return outputs_TKD

    def _passing_edges(self) -> Tensor | None:
        """Edges ``[E, E]`` along which something is passed, or None if there is none.

        Edges whose gain is zero count while gains are trained: otherwise they could never leave zero.
        """
        edges_EE = self.edges.triu(1)
        if self.resident is not None:
            edges_EE = edges_EE & self.resident & self.resident[:, None]
        if not (self.edge_gain.requires_grad and torch.is_grad_enabled()):
            edges_EE = edges_EE & (self.edge_gain != 0)
        return edges_EE if edges_EE.any() else None

    def _grouped_ffn(self, inputs_ND: Tensor, experts_N: Tensor) -> Tensor:
        """Each row through its own expert, one pair of matrix products per expert."""
        order = experts_N.argsort(stable=True)
        counts = torch.bincount(experts_N, minlength=self.num_experts).tolist()
        groups = inputs_ND[order].split(counts)
        results = [self._ffn(rows, expert) for expert, rows in enumerate(groups) if len(rows)]
        return torch.cat(results)[order.argsort()] if results else inputs_ND

    def _ffn(self, rows_ND: Tensor, expert: int) -> Tensor:
        gate_NH, up_NH = F.linear(rows_ND, self.gate_up_proj[expert]).chunk(2, -1)
        return F.linear(self.act_fn(gate_NH) * up_NH, self.down_proj[expert])


def execution_steps(active_TKK: Tensor, made_TK: Tensor) -> Tensor:
    """The step ``[T, K]`` in which each visit runs: one after the last of its active parents; -1 if not made.

    Args:
        active_TKK: bool, visit i passes something to visit j, i < j (visits sorted by expert).
        made_TK: bool, visits that the token makes.
    """
    steps_TK = made_TK.to(torch.int64) - 1
    for target in range(1, steps_TK.shape[-1]):
        after_T = ((steps_TK + 1) * active_TKK[:, :, target]).amax(-1)
        steps_TK[:, target] = torch.where(made_TK[:, target], after_T, -1)
    return steps_TK


def _between_visits(values_EE: Tensor, experts_TK: Tensor) -> Tensor:
    """Look ``values_EE`` up for each pair of a token's visits: ``[T, K, K]``, zero where a visit is not made."""
    padded = F.pad(values_EE, (0, 1, 0, 1))  # index E stands for a visit that is not made
    return padded[experts_TK[:, :, None], experts_TK[:, None, :]]
