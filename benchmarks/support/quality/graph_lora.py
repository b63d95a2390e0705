"""LoRA factors on every linear map of an expert graph, as FedIT has them on a dense model.

The experts of a layer take part as the FFN of one model: a pair of factors each for its gate, up and down projection,
whose product is cut into experts. A token receives the part of the experts that it visits.

Shape suffixes: D hidden width, E experts, H neurons per expert, F = E * H, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.graph.lora import attach_attention_lora
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


class _Factors(nn.Module):
    """Factors ``A [R, in]`` and ``B [out, R]`` of a change ``scale * B @ A``, zero at the start."""

    def __init__(self, size_in: int, size_out: int, rank: int, scale: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, size_in))
        self.lora_B = nn.Parameter(torch.zeros(size_out, rank))
        self._scale = scale
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def change(self) -> Tensor:
        """Change ``[out, in]``."""
        return self._scale * self.lora_B @ self.lora_A


class _GateUp(nn.Module):
    """Adds the changes of gate and up projection ``[F, D]`` to ``gate_up_proj [E, 2H, D]``."""

    def __init__(self, width: int, neurons: int, rank: int, scale: float) -> None:
        super().__init__()
        self.gate, self.up = (_Factors(width, neurons, rank, scale) for _ in range(2))

    def forward(self, weight_EHD: Tensor) -> Tensor:
        experts, width = len(weight_EHD), weight_EHD.shape[-1]
        parts = [each.change().view(experts, -1, width) for each in (self.gate, self.up)]
        return weight_EHD + torch.cat(parts, 1)


class _Down(nn.Module):
    """Adds the change of the down projection ``[D, F]`` to ``down_proj [E, D, H]``."""

    def __init__(self, width: int, neurons: int, rank: int, scale: float) -> None:
        super().__init__()
        self.down = _Factors(neurons, width, rank, scale)

    def forward(self, weight_EDH: Tensor) -> Tensor:
        change_DF = self.down.change()
        return weight_EDH + change_DF.unflatten(1, (len(weight_EDH), -1)).transpose(0, 1)


def graph_factors(
    graph: FedGraftForCausalLM, *, rank: int, alpha: float, seed: int
) -> dict[str, nn.Parameter]:
    """Attach LoRA factors to attention and experts of ``graph``, and return them by name.

    Args:
        graph: graph in memory with all experts, changed in place.
        rank: R.
        alpha: scale of the product, times the rank.
        seed: seed of the first factors.
    """
    attach_attention_lora(graph, rank=rank, alpha=alpha, seed=seed)
    torch.manual_seed(seed)
    scale = alpha / rank
    for layer in graph.expert_layers():
        width, neurons = layer.hidden_size, layer.num_experts * layer.expert_size
        for name, kind in (("gate_up_proj", _GateUp), ("down_proj", _Down)):
            parametrize.register_parametrization(layer, name, kind(width, neurons, rank, scale))
    return {name: each for name, each in graph.named_parameters() if "lora_" in name}
