"""View of the experts of one decoder layer of an opened model, whatever holds their weights.

Shape suffixes: D hidden width, E experts, H neurons per expert, N tokens of one expert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from configs.errors import UserError
from models.families.family import MoEFamily, RouterKind
from models.remote_code.execution_fedgraft import gated_ffn

# By removed expert: the expert that it was merged into, or None.
Removed = Mapping[int, int | None]


class ExpertRows(NamedTuple):
    """Inputs and outputs of one expert in one forward pass.

    Attributes:
        expert: its number.
        tokens: ``[N]``, positions in the flattened batch of the tokens routed to it.
        gates: ``[N]``, factors of its output.
        inputs: ``[N, D]``; in an expert graph with what passes along edges.
        outputs: ``[N, D]``, before the gates.
    """

    expert: int
    tokens: Tensor
    gates: Tensor
    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class MoELayer(ABC):
    """Experts and router of one decoder layer.

    Attributes:
        ordinal: index among the layers with experts, from 0.
        decoder: index of the decoder layer.
        family: names of its modules.
        kind: router kind.
        block: module in place of the dense FFN.
        router: module with ``weight [E, D]``.
        experts: holder of the experts' weights: fused tensors, a list of modules, or the block itself.
    """

    ordinal: int
    decoder: int
    family: MoEFamily
    kind: RouterKind
    block: nn.Module
    router: nn.Module
    experts: Any

    @property
    def router_weight(self) -> nn.Parameter:
        """Router weight ``[E, D]``."""
        return cast(nn.Parameter, self.router.weight)

    @property
    def selection_bias(self) -> Tensor | None:
        """Bias ``[E]`` of the scores that choose experts, not of the gates; None without one."""
        return getattr(self.router, self.family.selection_bias, None)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router_weight.shape[0]

    @property
    def num_shared(self) -> int:
        """Shared experts among the E, the first of the layer, which every token visits."""
        return 0

    @property
    def top_k(self) -> int:
        """Experts per token; at most E."""
        names = self.family.top_k_names
        owner = self.router if hasattr(self.router, names[0]) else self.block
        for name in names:
            if isinstance(getattr(owner, name, None), int):
                return min(getattr(owner, name), self.num_experts)
        raise UserError(f"expected top_k on the router of decoder layer {self.decoder}, got none")

    @property
    def fused(self) -> bool:
        """Whether one tensor holds all experts, as transformers 5 stores them."""
        return False

    @property
    def act_fn(self) -> nn.Module:
        """Activation function of the gate."""
        return cast(nn.Module, self.experts.act_fn)

    @abstractmethod
    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        """``gate_up [2H, D]`` and ``down [D, H]`` of an expert."""

    @abstractmethod
    def write(self, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """Replace the weights of an expert, cast to the dtype and device of the old ones."""

    @abstractmethod
    def remove(self, removed: Removed) -> None:
        """Remove experts in place, at least one of them and not all; this view is stale afterwards."""

    @abstractmethod
    def observe(self, on_rows: Callable[[ExpertRows], None]) -> AbstractContextManager[None]:
        """Context in which each forward pass calls ``on_rows`` for every visited expert."""

    @torch.no_grad()
    def read_numpy(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """``gate_up [2H, D]`` and ``down [D, H]`` of an expert, fp32."""
        gate_up, down = self.read(expert)
        return gate_up.float().cpu().numpy(), down.float().cpu().numpy()

    def run(self, expert: int, rows_ND: Tensor) -> Tensor:
        """Output ``[N, D]`` of an expert, without its gate and without inputs along edges."""
        return gated_ffn(self.act_fn, rows_ND, *self.read(expert))


class RoutedLayer(MoELayer):
    """Layer of a plain mixture of experts, routed by a module of its own."""

    def remove(self, removed: Removed) -> None:
        """Remove experts with their router rows and selection biases."""
        kept = torch.tensor([expert for expert in range(self.num_experts) if expert not in removed])
        self._keep_router_rows(kept)
        self._keep_experts(kept)

    @abstractmethod
    def _keep_experts(self, kept: Tensor) -> None: ...

    def _keep_router_rows(self, kept: Tensor) -> None:
        bias = self.selection_bias
        self.router.weight = nn.Parameter(self.router_weight[kept])
        if bias is not None:
            rows = bias[kept]
            trains = isinstance(bias, nn.Parameter)
            setattr(self.router, self.family.selection_bias, nn.Parameter(rows) if trains else rows)
        if isinstance(self.router, nn.Linear):
            self.router.out_features = len(kept)
        for module in (self.block, self.router, self.experts):
            for name in self.family.count_keys:
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, len(kept))
            for name in self.family.top_k_names:
                if isinstance(top_k := getattr(module, name, None), int):
                    setattr(module, name, min(top_k, len(kept)))
