"""A mixture whose experts are modules of their own, as remote code and older checkpoints have them."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


class Expert(nn.Module):
    """A gated FFN ``D -> H -> D``."""

    def __init__(self, width: int, neurons: int, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, neurons, bias=False)
        self.up_proj = nn.Linear(width, neurons, bias=False)
        self.down_proj = nn.Linear(neurons, width, bias=False)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """Output ``[N, D]`` of the expert."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ModuleMoE(nn.Module):
    """Softmax, then top-k, renormalized or not; the experts run one after another.

    Args:
        fused: transformers' block, whose weights are copied.
        top_k: experts per token.
        renormalize: whether gates sum to one.
    """

    def __init__(self, fused, top_k: int, renormalize: bool) -> None:
        super().__init__()
        experts, twice, width = fused.experts.gate_up_proj.shape
        self.top_k, self.renormalize = top_k, renormalize
        self.gate = nn.Linear(width, experts, bias=False)
        self.gate.weight.data = fused.gate.weight.data.clone()
        self.experts = nn.ModuleList(Expert(width, twice // 2, fused.experts.act_fn) for _ in range(experts))
        for index, expert in enumerate(list(self.experts)):
            gate, up = fused.experts.gate_up_proj.data[index].chunk(2)
            expert.gate_proj.weight.data, expert.up_proj.weight.data = gate.clone(), up.clone()
            expert.down_proj.weight.data = fused.experts.down_proj.data[index].clone()

    def forward(self, hidden: Tensor) -> Tensor:
        """Weighted sum of the outputs of the top-k experts, ``[B, S, D]``."""
        x = hidden.flatten(0, 1)
        weights, chosen = F.softmax(self.gate(x), dim=-1).topk(self.top_k, -1)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            tokens, places = torch.where(chosen == index)
            if len(tokens):
                out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, places, None])
        return out.view_as(hidden)


def with_module_experts(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a Qwen3-MoE or OLMoE whose experts are modules."""
    model = copy.deepcopy(model)
    for decoder in model.model.layers:
        decoder.mlp = ModuleMoE(
            decoder.mlp, model.config.num_experts_per_tok, bool(model.config.norm_topk_prob)
        )
    return model
