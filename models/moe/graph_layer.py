"""Experts of an expert graph: one block holds weights, router and edges.

Shape suffixes: T tokens, D hidden width, E experts, K visits per token, N tokens of one expert, H neurons per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from configs.errors import UserError
from experts.graph.expert_edits import remove_from_mask, still_attached
from models.graph.renumber import renumber_layer
from models.moe.layers import ExpertRows, MoELayer, Removed
from models.remote_code.dispatch_fedgraft import Visits, dispatch
from models.remote_code.execution_fedgraft import gated_ffn
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.routing_fedgraft import Walk
from models.remote_code.weights_fedgraft import ExpertStorage


class GraphLayer(MoELayer):
    """Layer of an expert graph; ``experts`` is its block."""

    experts: ExpertGraphMLP

    @property
    def num_shared(self) -> int:
        """Shared experts, the first of the layer, which every token visits."""
        return self.experts.num_shared

    @property
    def top_k(self) -> int:
        """Visits per token; at most E."""
        return min(self.experts.num_visits, self.num_experts)

    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        """``gate_up [2H, D]`` and ``down [D, H]`` of an expert."""
        return self.experts.read_expert(expert)

    def write(self, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """Replace the weights of an expert, cast to the dtype and device of the old ones."""
        self.experts.write_expert(expert, gate_up, down)

    @torch.no_grad()
    def remove(self, removed: Removed) -> None:
        """Remove experts and rewire the edges as ``apply_expert_edits`` does; the graph version stays.

        Raises:
            UserError: experts outside the fused tensors, or a shared expert among the removed or merged ones.
        """
        block = self.experts
        if block.storage is not None or block.held != list(range(block.num_experts)):
            raise UserError(
                "expected a graph that holds all its experts in memory, got one that has them elsewhere"
            )
        edited = remove_from_mask(block.edges.cpu().numpy(), removed, self.ordinal, block.num_shared)
        attached = still_attached(edited.mask, edited.kept, block.attached)
        renumber_layer(block, edited.kept)
        learned = ~torch.from_numpy(edited.added).to(block.edges.device)
        block.edge_gain.mul_(learned)
        block.edge_affinity.mul_(learned)
        block.edges.copy_(torch.from_numpy(edited.mask))
        block.attached = list(attached)

    @contextmanager
    def observe(self, on_rows: Callable[[ExpertRows], None]) -> Iterator[None]:
        """Context in which each forward pass calls ``on_rows`` for every visited expert, which runs once."""
        block, observed = self.experts, _Observed(self.experts, on_rows)
        block.observers.append(observed.walked)
        try:
            with _storage(block, observed):
                yield
        finally:
            block.observers.remove(observed.walked)


class _Observed:
    """Expert storage that runs experts from the storage before it and reports their rows."""

    def __init__(self, block: ExpertGraphMLP, on_rows: Callable[[ExpertRows], None]) -> None:
        self._block, self._on_rows = block, on_rows
        self._before: ExpertStorage | None = block.storage
        self._visits: Visits | None = None
        self._weights = torch.empty(0)

    def walked(self, block: ExpertGraphMLP, scores: Tensor, walk: Walk, weights_TK: Tensor) -> None:
        """Note the visits of this forward pass and their output weights."""
        self._visits, self._weights = dispatch(walk.experts_TK, block.num_experts), weights_TK.flatten()

    def run(self, expert: int, rows_ND: Tensor) -> Tensor:
        outputs_ND = self._run(expert, rows_ND)
        assert self._visits is not None
        places, tokens = self._visits.places[expert], self._visits.token_indices[expert]
        self._on_rows(ExpertRows(expert, tokens, self._weights[places], rows_ND, outputs_ND))
        return outputs_ND

    def _run(self, expert: int, rows_ND: Tensor) -> Tensor:
        if self._before is not None:
            return self._before.run(expert, rows_ND)
        row = self._block.held.index(expert)
        block = self._block
        return gated_ffn(block.act_fn, rows_ND, block.gate_up_proj[row], block.down_proj[row])

    def renumber(self, origin: Sequence[int]) -> None:
        """Not supported: experts are not renumbered while they are observed.

        Raises:
            ValueError: always.
        """
        raise ValueError("expected to renumber experts outside of an observation")

    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        with _storage(self._block, self._before):
            return self._block.read_expert(expert)

    def write(self, expert: int, gate_up: Tensor, down: Tensor) -> None:
        with _storage(self._block, self._before):
            self._block.write_expert(expert, gate_up, down)


@contextmanager
def _storage(block: ExpertGraphMLP, storage: ExpertStorage | None) -> Iterator[None]:
    before, block.storage = block.storage, storage
    try:
        yield
    finally:
        block.storage = before
