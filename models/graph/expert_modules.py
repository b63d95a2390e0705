"""Experts as separate linear layers, plain or 4-bit, for LoRA.

Fused experts do not support it: transformers leaves fused three-dimensional experts in fp32 when it loads in 4 bits,
and LoRA on fused parameters under bitsandbytes gives some factors no gradient.

Shape suffixes: N rows, D hidden width, H neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.graph.attention_vectors import quantize_attention
from models.graph.runtime_settings import held_experts
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.runtime.memory import return_freed_memory
from models.runtime.nf4 import compute_dtype, quantized_linear, weight_of

KINDS = ("plain", "nf4")


class ExpertFFN(nn.Module):
    """Gated FFN of one expert from linear layers: ``down(act(gate x) * up x)``.

    Args:
        gate_up: linear layer ``D -> 2H``.
        down: linear layer ``H -> D``.
        act_fn: activation of the gate.
    """

    def __init__(self, gate_up: nn.Module, down: nn.Module, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down, self.act_fn = gate_up, down, act_fn

    def forward(self, rows_ND: Tensor) -> Tensor:
        """``[N, D] -> [N, D]``."""
        gate_NH, up_NH = self.gate_up(rows_ND).chunk(2, -1)
        return self.down(self.act_fn(gate_NH) * up_NH)


class ExpertModules(nn.Module):
    """Storage of one layer (see ``ExpertStorage``) with experts as modules.

    Args:
        experts: experts by index.
        dtype: dtype of the matrix products.
    """

    def __init__(self, experts: dict[int, ExpertFFN], dtype: torch.dtype) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({str(expert): module for expert, module in experts.items()})
        self.dtype = dtype

    @property
    def held(self) -> list[int]:
        """Indices of the held experts, ascending."""
        return sorted(int(expert) for expert in self.experts)

    def expert(self, expert: int) -> Any:
        """Module of one expert, an ``ExpertFFN``.

        Raises:
            ValueError: the expert is not held.
        """
        if str(expert) not in self.experts:
            raise ValueError(f"expected an expert among {self.held}, got {expert}, which is not held")
        return self.experts[str(expert)]

    def run(self, expert: int, rows_ND: Tensor) -> Tensor:
        """Output ``[N, D]`` of an expert including LoRA, in the dtype of the rows."""
        return self.expert(expert)(rows_ND.to(self.dtype)).to(rows_ND.dtype)

    @torch.no_grad()
    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        """``gate_up [2H, D]`` and ``down [D, H]`` of an expert without LoRA; dequantized if they are 4-bit."""
        module = self.expert(expert)
        return weight_of(module.gate_up), weight_of(module.down)

    def write(self, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """Not supported: the base weights under LoRA factors are fixed.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"expert {expert} is a fixed base under LoRA; write it before materialize_modules")

    def renumber(self, origin: Sequence[int]) -> None:
        """Not supported: a graph is edited before its experts become modules.

        Raises:
            ValueError: always.
        """
        raise ValueError("expected to renumber experts before materialize_modules")


@torch.no_grad()
def materialize_modules(
    model: FedGraftForCausalLM,
    residents: Sequence[Tensor | None],
    *,
    kind: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Load ``residents`` as modules on the model's device, and no other expert.

    Each expert is read once from its storage, so that a graph with experts on disk is never in memory as a whole. With
    ``nf4`` the attention projections become 4-bit, too; embeddings, norms, output head, routers and gains do not.

    Args:
        model: graph to change in place.
        residents: per layer bool ``[E]``, None for all.
        kind: ``plain`` or ``nf4``.
        dtype: dtype of the matrix products and of plain weights; None for bf16 if it is faster on the device, else
            fp32.

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"expected experts of kind {' or '.join(KINDS)}, got {kind!r}")
    dtype = dtype or compute_dtype(model.device)
    for layer, resident in zip(model.expert_layers(), residents, strict=True):
        held = held_experts(layer, resident)
        experts = {expert: _build_expert(layer, expert, kind, dtype, model.device) for expert in held}
        layer.keep_in(ExpertModules(experts, dtype))
        layer.resident = None if resident is None else resident.to(model.device)
        layer.residency_gate = None
        return_freed_memory()
    if kind == "nf4":
        quantize_attention(model, dtype)
        vars(model)["is_loaded_in_4bit"] = True  # read by peft and transformers


def _build_expert(
    layer: ExpertGraphMLP, expert: int, kind: str, dtype: torch.dtype, device: torch.device
) -> ExpertFFN:
    build = quantized_linear if kind == "nf4" else _plain_linear
    gate_up, down = (build(weight, dtype=dtype, device=device) for weight in layer.read_expert(expert))
    return ExpertFFN(gate_up, down, layer.act_fn)


def _plain_linear(weight: Tensor, *, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    # A copy, because a view would keep the fused tensor of all experts in memory.
    linear.weight = nn.Parameter(weight.detach().to(device, dtype, copy=True), requires_grad=False)
    return linear
