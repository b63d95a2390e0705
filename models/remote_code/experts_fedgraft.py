"""One layer of an expert graph: fused expert weights, and their execution in the order of the edges.

Shape suffixes: T tokens, D hidden width, E experts, K visits per token, H neurons per expert, N (token, visit) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .decode_fedgraft import run_one_token, walk_one_token
from .dense_path_fedgraft import all_visit, run_all_visited
from .dispatch_fedgraft import Visits, find_links, sort_visits
from .execution_fedgraft import FusedExperts, gated_ffn, run_visits
from .routing_fedgraft import Walk, walk_graph

# What decides where a token goes and what passes along edges.
ROUTING = ("router", "edge_gain", "edge_affinity", "output_gain")


class ExpertStorage(Protocol):
    """Where the weights of a layer's experts are, if not in its fused tensors: on disk, or quantized."""

    def run(self, expert: int, rows_ND: Tensor) -> Tensor:
        """Output ``[N, D]`` of an expert for at least one row."""

    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        """``gate_up [2H, D]`` and ``down [D, H]`` of an expert."""

    def write(self, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """Replace the weights of an expert."""


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
        held: the experts whose weights the fused tensors hold, one a row; all of them unless ``hold`` says otherwise.
        storage: holds and runs the experts in place of the fused tensors; None where those do.
        resident: bool ``[E]`` on the layer's device, the experts that may be visited; None for all.
        residency_gate: ``[E]``, or None. While a mask is learned: multiplies each expert's output and lets every token
            also compute its best non-resident expert, so that both sides of the budget receive a gradient.
        observers: called in turn with ``(layer, scores [T, E], walk, output_weights [T, K])`` in each forward. The
            scores carry their gradient, for losses on them.
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
        self.hidden_size, self.expert_size = hidden_size, expert_size
        self.act_fn = ACT2FN[activation]
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        self.router = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.edge_gain = nn.Parameter(torch.zeros(num_experts, num_experts))
        self.edge_affinity = nn.Parameter(torch.zeros(num_experts, num_experts))
        self.output_gain = nn.Parameter(torch.zeros(num_experts))
        self.register_buffer("edges", torch.eye(num_experts, dtype=torch.bool))
        self.register_buffer("neurons", torch.arange(num_experts * expert_size).view(num_experts, -1))
        self.held = list(range(num_experts))
        self.storage: ExpertStorage | None = None
        self.resident: Tensor | None = None
        self.residency_gate: Tensor | None = None
        self.observers: list[Callable[[ExpertGraphMLP, Tensor, Walk, Tensor], None]] = []

    @property
    def num_experts(self) -> int:
        """E of this layer."""
        return self.router.shape[0]

    def hold(self, experts: Iterable[int], gate_up_RHD: Tensor, down_RDH: Tensor) -> None:
        """Keep the weights of ``experts`` alone in the fused tensors, ``[R, 2H, D]`` and ``[R, D, H]``."""
        self.held = list(experts)
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up_RHD), nn.Parameter(down_RDH)

    def keep_in(self, storage: ExpertStorage) -> None:
        """Leave all experts to ``storage``, and none in the fused tensors."""
        like = self.router
        self.hold(
            [],
            like.new_empty(0, 2 * self.expert_size, self.hidden_size),
            like.new_empty(0, self.hidden_size, self.expert_size),
        )
        self.storage = storage

    def read_expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """``gate_up [2H, D]`` and ``down [D, H]`` of an expert, wherever it is stored.

        Raises:
            ValueError: the layer does not hold this expert.
        """
        if self.storage is not None:
            return self.storage.read(expert)
        return self.gate_up_proj[self._row(expert)], self.down_proj[self._row(expert)]

    @torch.no_grad()
    def write_expert(self, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """Replace the weights of an expert, wherever it is stored.

        Raises:
            ValueError: the layer does not hold this expert.
        """
        if self.storage is not None:
            self.storage.write(expert, gate_up, down)
        else:
            self.gate_up_proj[self._row(expert)] = gate_up.to(self.gate_up_proj)
            self.down_proj[self._row(expert)] = down.to(self.down_proj)

    def _row(self, expert: int) -> int:
        if expert not in self.held:
            raise ValueError(f"layer {self.layer_index} does not hold expert {expert}")
        return self.held.index(expert)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``.

        Raises:
            FloatingPointError: a router score is not finite.
        """
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores_TE = self.score(x_TD)
        if len(x_TD) == 1 and self._walks_plainly():
            return self._one_token(x_TD, scores_TE).view_as(hidden_states)
        walk = self.walk(scores_TE)
        weights_TK = self.output_weights(walk)
        self._observe(scores_TE, walk, weights_TK)
        experts_TK = walk.experts_TK
        if self.residency_gate is not None:
            experts_TK, weights_TK = self._with_runner_up(scores_TE, experts_TK, weights_TK)
        return self._execute(x_TD, experts_TK, weights_TK).view_as(hidden_states)

    def walk(self, scores_TE: Tensor) -> Walk:
        """The experts that tokens with these scores visit."""
        return walk_graph(
            scores_TE=scores_TE,
            edges_EE=self.edges,
            affinity_EE=self.edge_affinity,
            resident_E=self.resident,
            num_visits=self.num_visits,
            order=self.order,
        )

    def _walks_plainly(self) -> bool:
        return self.order == "best-first" and self.residency_gate is None and not torch.is_grad_enabled()

    def _one_token(self, x_TD: Tensor, scores_TE: Tensor) -> Tensor:
        walk = walk_one_token(
            scores_E=scores_TE[0],
            edges_EE=self.edges,
            affinity_EE=self.edge_affinity,
            resident_E=self.resident,
            num_visits=self.num_visits,
        )
        weights_TK = self.output_weights(walk)
        self._observe(scores_TE, walk, weights_TK)
        return run_one_token(
            x_TD[0],
            weights_TK[0].tolist(),
            walk.experts_TK[0].tolist(),
            (self.edge_gain * self._passing_edges()).tolist(),
            self._run_expert,
        )[None]

    def _run_expert(self, expert: int, rows_ND: Tensor) -> Tensor:
        if self.storage is not None:
            return self.storage.run(expert, rows_ND)
        row = self._row(expert)
        return gated_ffn(self.act_fn, rows_ND, self.gate_up_proj[row], self.down_proj[row])

    def _observe(self, scores_TE: Tensor, walk: Walk, weights_TK: Tensor) -> None:
        for observer in self.observers:
            observer(self, scores_TE, walk, weights_TK.detach())

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

    def output_weights(self, walk: Walk) -> Tensor:
        """``w [T, K]``: one plus the expert's output gain times its share among the visited; 1 for visits not made."""
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
        """Weighted sum of the visited experts' outputs, ``[T, D]``."""
        visits = sort_visits(experts_TK, self.num_experts)
        links = find_links(visits, self._passing_edges(), len(x_TD))
        if self.storage is not None:
            return run_visits(x_TD, weights_TK, self.edge_gain, visits, links, self.storage.run)
        self._check_held(visits)
        matrices = (self.gate_up_proj, self.down_proj)
        if self.held and not links and all_visit(visits, self.held, len(x_TD)):
            return run_all_visited(x_TD, weights_TK, visits, *matrices, self.act_fn, self.held)
        return FusedExperts.apply(
            x_TD, weights_TK, self.edge_gain, *matrices, visits, links, self.act_fn, self.held
        )

    def _check_held(self, visits: Visits) -> None:
        for expert, tokens in enumerate(visits.tokens):
            if len(tokens):
                self._row(expert)

    def _passing_edges(self) -> Tensor:
        """The edges ``[E, E]`` that may pass something.

        Edges whose gain is zero count while gains are trained: otherwise they could never leave zero.
        """
        edges_EE = self.edges.triu(1)
        if self.resident is not None:
            edges_EE = edges_EE & self.resident & self.resident[:, None]
        if not (self.edge_gain.requires_grad and torch.is_grad_enabled()):
            edges_EE = edges_EE & (self.edge_gain != 0)
        return edges_EE
