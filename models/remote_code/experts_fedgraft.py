"""One layer of an expert graph: router, walk, output weights, and the weighted sum of the visited experts.

Shape suffixes: T tokens, D hidden width, E experts, K visits per token, H neurons per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .attached_fedgraft import chosen_experts, with_attached
from .decode_fedgraft import run_one_token, walk_one_token
from .default_fedgraft import DefaultOutput
from .router_fedgraft import GraphRouter
from .routing_fedgraft import Walk, is_top_k, walk_graph
from .weights_fedgraft import LayerExperts

# Names of the parameters that decide where a token goes and what passes along edges, see ``routing_parameters``.
ROUTING = ("router", "edge_gain", "edge_affinity", "output_gain")


class ExpertGraphMLP(LayerExperts):
    """A graph of experts in place of a dense gated FFN.

    Args:
        hidden_size: D.
        expert_size: H.
        num_experts: E.
        num_visits: experts that each token visits, K.
        num_shared: shared experts, the first of the layer, which every token visits before all others.
        default_rank: rank of the default output of experts that are not visited; 0: none.
        default_experts: number of experts that the default output was fitted for; None for E.
        attached: experts that are visited wherever an expert with an edge to them is, and never chosen by the walk.
        activation: name of the gate's activation, in Hugging Face's terms.
        order: ``best-first`` or ``depth-first`` (see ``walk_graph``).
        layer_index: index of the decoder layer, for messages.

    Attributes:
        default: default output of experts that are not visited (``DefaultOutput``); None without one.
        router: module from tokens ``[T, D]`` to router logits ``[T, E]``.
        edges: bool ``[E, E]``, upper-triangular; the diagonal marks roots.
        edge_gain: ``[E, E]``, share of its source's output that an edge passes.
        edge_affinity: ``[E, E]``, added to the router logit of an expert that is reached along the edge.
        output_gain: ``[E]``, weight of an expert's softmax share in its output weight.
        ids: identity of each expert in a federation, which outlasts renumbering; not stored in checkpoints.
        resident: bool ``[E]`` on the layer's device, the experts that may be visited; None for all.
        residency_gate: ``[E]``, or None. While a mask is learned: multiplies each expert's output and lets every token
            also compute its best non-resident expert, so that both sides of the budget receive a gradient.
        observers: called in turn with ``(layer, logits [T, E], walk, output_weights [T, K])`` in each forward. The
            logits carry their gradient, for losses on them.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        num_visits: int,
        num_shared: int = 0,
        default_rank: int = 0,
        default_experts: int | None = None,
        attached: Sequence[int] = (),
        activation: str = "silu",
        order: str = "best-first",
        layer_index: int = 0,
    ):
        super().__init__(
            hidden_size=hidden_size,
            expert_size=expert_size,
            num_experts=num_experts,
            activation=activation,
            layer_index=layer_index,
        )
        self.num_visits, self.num_shared, self.order = num_visits, num_shared, order
        self.attached, self.ids = list(attached), tuple(range(num_experts))
        self.router = GraphRouter(hidden_size=hidden_size, num_experts=num_experts, layer_index=layer_index)
        fitted = num_experts if default_experts is None else default_experts
        self.default = (
            DefaultOutput(hidden_size=hidden_size, rank=default_rank, num_experts=fitted)
            if default_rank
            else None
        )
        self.edge_gain = nn.Parameter(torch.zeros(num_experts, num_experts))
        self.edge_affinity = nn.Parameter(torch.zeros(num_experts, num_experts))
        self.output_gain = nn.Parameter(torch.zeros(num_experts))
        self.register_buffer("edges", torch.eye(num_experts, dtype=torch.bool))
        self.resident: Tensor | None = None
        self.residency_gate: Tensor | None = None
        self.observers: list[Callable[[ExpertGraphMLP, Tensor, Walk, Tensor], None]] = []

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.router.weight.shape[0]

    def routing_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of router and graph by the names of ``ROUTING``, in that order."""
        return {name: self.router.weight if name == "router" else getattr(self, name) for name in ROUTING}

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``.

        Raises:
            FloatingPointError: a router logit is not finite.
        """
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores_TE = self.router(x_TD)
        edges_EE, one = self._passing_edges(), len(x_TD) == 1 and self._walks_plainly()
        walk = self._walk_one_token(scores_TE) if one else self.walk(scores_TE)
        weights_TK, walked_TK = self.output_weights(walk), walk.experts_TK
        if self.attached:
            walk, weights_TK = self._with_attached(walk, weights_TK, scores_TE)
        experts_TK = walk.experts_TK
        self._observe(scores_TE, walk, weights_TK)
        if one and not self.runs_wide(x_TD, experts_TK.shape[1], edges_EE):
            result_TD = self._run_one_token(x_TD, weights_TK, experts_TK, edges_EE)
            return self._with_default(result_TD, x_TD, walked_TK).view_as(hidden_states)
        if self.residency_gate is not None:
            experts_TK, weights_TK = self._with_runner_up(scores_TE, experts_TK, weights_TK)
        result_TD = self.run_experts(x_TD, weights_TK, experts_TK, self.edge_gain, edges_EE)
        return self._with_default(result_TD, x_TD, walked_TK).view_as(hidden_states)

    def _with_default(self, result_TD: Tensor, x_TD: Tensor, experts_TK: Tensor) -> Tensor:
        if self.default is None:
            return result_TD
        return result_TD + self.default(x_TD, experts_TK)

    def walk(self, scores_TE: Tensor) -> Walk:
        """Walk of tokens with the router logits ``[T, E]``."""
        return walk_graph(
            scores_TE=scores_TE,
            edges_EE=self.edges,
            affinity_EE=self.edge_affinity,
            resident_E=self.chosen_residents(),
            num_visits=self.num_visits,
            order=self.order,
            num_shared=self.num_shared,
        )

    def chosen_residents(self) -> Tensor | None:
        """Experts that the walk may choose, bool ``[E]``: residents that are not attached; None for all."""
        return chosen_experts(self.resident, self.attached, self.output_gain)

    def _with_attached(self, walk: Walk, weights_TK: Tensor, scores_TE: Tensor) -> tuple[Walk, Tensor]:
        return with_attached(
            walk,
            weights_TK,
            scores_TE=scores_TE,
            edges_EE=self.edges,
            attached=self.attached,
            resident_E=self.resident,
        )

    def _walks_plainly(self) -> bool:
        return self.order == "best-first" and self.residency_gate is None and not torch.is_grad_enabled()

    def _walk_one_token(self, scores_TE: Tensor) -> Walk:
        chosen_E = self.chosen_residents()
        if is_top_k(self.edges, self.edge_affinity, chosen_E):
            return self.walk(scores_TE)
        return walk_one_token(
            scores_E=scores_TE[0],
            edges_EE=self.edges,
            affinity_EE=self.edge_affinity,
            resident_E=chosen_E,
            num_visits=self.num_visits,
            num_shared=self.num_shared,
        )

    def _run_one_token(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, edges_EE: Tensor
    ) -> Tensor:
        return run_one_token(
            x_TD[0],
            weights_TK[0].tolist(),
            experts_TK[0].tolist(),
            (self.edge_gain * edges_EE).tolist(),
            self.run_expert,
        )[None]

    def _observe(self, scores_TE: Tensor, walk: Walk, weights_TK: Tensor) -> None:
        for observer in self.observers:
            observer(self, scores_TE, walk, weights_TK.detach())

    def output_weights(self, walk: Walk) -> Tensor:
        """Output weights ``[T, K]``: one plus output gain times softmax share; 1 for visits not made."""
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
            outside_TE[:, self.attached] = float("-inf")
            best = outside_TE.max(-1, keepdim=True)
            runner_up = best.indices.where(best.values > float("-inf"), -1)
        experts = torch.cat([experts_TK, runner_up], -1)
        weights = torch.cat([weights_TK, torch.ones_like(weights_TK[:, :1])], -1)
        return experts, weights * self.residency_gate[experts.clamp(min=0)]

    def _passing_edges(self) -> Tensor:
        """Mask ``[E, E]`` of the edges that pass information.

        While gains are trained it includes edges of zero gain, which otherwise would receive no gradient.
        """
        edges_EE = self.edges.triu(1)
        if self.resident is not None:
            edges_EE = edges_EE & self.resident & self.resident[:, None]
        if not (self.edge_gain.requires_grad and torch.is_grad_enabled()):
            edges_EE = edges_EE & (self.edge_gain != 0)
        return edges_EE
