"""Weights of the experts of one layer: fused tensors of the experts in memory, or a storage elsewhere.

Shape suffixes: T tokens, D hidden width, E experts, H neurons per expert, K visits per token, N rows of one expert,
R experts in the fused tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .dense_path_fedgraft import run_wide, wide_is_faster
from .dispatch_fedgraft import dispatch, find_links
from .execution_fedgraft import FusedExperts, compute_dtype, gated_ffn, run_visits


class ExpertStorage(Protocol):
    """Storage of a layer's experts outside of its fused tensors: on disk, or quantized."""

    def run(self, expert: int, rows_ND: Tensor) -> Tensor:
        """Output ``[N, D]`` of an expert for at least one row."""

    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        """``gate_up [2H, D]`` and ``down [D, H]`` of an expert."""

    def write(self, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """Replace the weights of an expert."""

    def renumber(self, origin: Sequence[int]) -> None:
        """Select and reorder experts: ``origin[e]`` is the present number of e; -1: a new one of zeros."""


class LayerExperts(nn.Module):
    """The gated FFNs of the experts of one layer, wherever their weights are stored.

    Args:
        hidden_size: D.
        expert_size: H.
        num_experts: E.
        activation: name of the gate's activation, in Hugging Face's terms.
        layer_index: index of the decoder layer, for messages.

    Attributes:
        neurons: int64 ``[E, H]``, neurons of the dense FFN that the experts came from; -1 for new ones.
        held: experts in the fused tensors, one a row; all of them unless ``hold`` selects some.
        storage: holds and runs the experts in place of the fused tensors; None where those do.
    """

    def __init__(
        self, *, hidden_size: int, expert_size: int, num_experts: int, activation: str, layer_index: int
    ):
        super().__init__()
        self.hidden_size, self.expert_size, self.layer_index = hidden_size, expert_size, layer_index
        self.act_fn = ACT2FN[activation]
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        self.register_buffer("neurons", torch.arange(num_experts * expert_size).view(num_experts, -1))
        self.held = list(range(num_experts))
        self.storage: ExpertStorage | None = None

    def hold(self, experts: Iterable[int], gate_up_RHD: Tensor, down_RDH: Tensor) -> None:
        """Keep the weights of ``experts`` alone in the fused tensors, ``[R, 2H, D]`` and ``[R, D, H]``."""
        self.held = list(experts)
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up_RHD), nn.Parameter(down_RDH)

    def keep_in(self, storage: ExpertStorage) -> None:
        """Leave all experts to ``storage``, and none in the fused tensors."""
        device = self.neurons.device
        self.hold(
            [],
            torch.empty(0, 2 * self.expert_size, self.hidden_size, device=device),
            torch.empty(0, self.hidden_size, self.expert_size, device=device),
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

    def run_expert(self, expert: int, rows_ND: Tensor) -> Tensor:
        """Output ``[N, D]`` of one expert.

        Raises:
            ValueError: the layer does not hold this expert.
        """
        if self.storage is not None:
            return self.storage.run(expert, rows_ND)
        return gated_ffn(self.act_fn, rows_ND, *self.read_expert(expert))

    def run_experts(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, edge_gain_EE: Tensor, edges_EE: Tensor
    ) -> Tensor:
        """Weighted sum of the outputs of the visited experts, ``[T, D]``, by the faster way.

        Args:
            x_TD: input of the layer.
            weights_TK: output weight of each visit.
            experts_TK: visited experts; -1 for visits that are not made.
            edge_gain_EE: share of its source's output that each edge passes.
            edges_EE: bool, the edges that pass information, strictly upper-triangular.

        Raises:
            ValueError: a visited expert is not held.
        """
        matrices = (self.gate_up_proj, self.down_proj)
        if self.runs_wide(x_TD, int((experts_TK >= 0).sum()), edges_EE):
            self._check_held(experts_TK)
            edges = edges_EE.nonzero().tolist()
            return run_wide(
                x_TD, weights_TK, experts_TK, edge_gain_EE, edges, *matrices, self.act_fn, self.held
            )
        visits = dispatch(experts_TK, len(edges_EE))
        links = find_links(visits, edges_EE, len(x_TD))
        if self.storage is not None:
            return run_visits(x_TD, weights_TK, edge_gain_EE, visits, links, self.storage.run)
        self._check_held(experts_TK)
        return FusedExperts.apply(
            x_TD, weights_TK, edge_gain_EE, *matrices, visits, links, self.act_fn, self.held
        )

    def runs_wide(self, x_TD: Tensor, visits: int, edges_EE: Tensor) -> bool:
        """Whether all experts run as one wide FFN for ``visits`` visits of the tokens; see ``wide_is_faster``."""
        if self.storage is not None or not self.held:
            return False
        return wide_is_faster(
            tokens=len(x_TD),
            visits=visits,
            experts=len(self.held),
            edges=int(edges_EE.sum()),
            shape=(self.expert_size, self.hidden_size),
            dtype=compute_dtype(x_TD),
        )

    def _check_held(self, experts_TK: Tensor) -> None:
        if len(self.held) < len(self.neurons):
            for expert in experts_TK.unique().tolist():
                if expert >= 0:
                    self._row(expert)

    def _row(self, expert: int) -> int:
        if expert not in self.held:
            raise ValueError(f"layer {self.layer_index} does not hold expert {expert}")
        return self.held.index(expert)
