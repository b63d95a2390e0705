"""Relative time of saliency collection, and its deviation from the published REAP formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.support.statistics import alternate, median_ratio
from models.moe.saliency_collection import Batch, collect_saliency
from models.moe.views import moe_layers


def tool_figures(moe: PreTrainedModel, batches: Sequence[Batch], repeats: int) -> dict[str, float]:
    """Largest relative deviation from the published formula, and time of collection over that of a forward pass."""
    found, plain = collect_saliency(moe, batches).scores("reap"), plain_reap(moe, batches)

    @torch.no_grad()
    def forward() -> None:
        for input_ids, _ in batches:
            moe(input_ids=input_ids, use_cache=False)

    times = alternate({"collect": lambda: collect_saliency(moe, batches), "plain": forward}, repeats=repeats)
    return {
        "reap_formula_difference": float(np.abs(found - plain).max() / plain.max()),
        "saliency_time_ratio": median_ratio(times["collect"], times["plain"]),
    }


@torch.no_grad()
def plain_reap(moe: PreTrainedModel, batches: Sequence[Batch]) -> np.ndarray:
    """REAP (arXiv:2510.13999) computed with every expert on every token: mean of gate x output norm where routed.

    Args:
        moe: MoE with plain top-k routing.
        batches: token ids and token masks, ``[B, S]`` each.

    Returns:
        scores ``[L, E]``.
    """
    layers = moe_layers(moe)
    total, count = (torch.zeros(len(layers), layers[0].num_experts, dtype=torch.float64) for _ in range(2))
    inputs: dict[int, torch.Tensor] = {}
    hooks = [layer.block.register_forward_pre_hook(_noting(inputs, layer.ordinal)) for layer in layers]
    for input_ids, token_mask in batches:
        moe(input_ids=input_ids, use_cache=False)
        for layer in layers:
            x = inputs[layer.ordinal].flatten(0, 1)[token_mask.flatten()]
            probabilities = torch.softmax(x @ layer.router_weight.T, -1)
            best, chosen = probabilities.topk(layer.top_k, -1)
            gates = torch.zeros_like(probabilities).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
            for expert in range(layer.num_experts):
                gate_up, down = layer.read(expert)
                gate, up = (x @ gate_up.T).chunk(2, -1)
                norms = (torch.nn.functional.silu(gate) * up @ down.T).norm(dim=-1)
                total[layer.ordinal, expert] += (gates[:, expert] * norms).sum().double()
                count[layer.ordinal, expert] += (gates[:, expert] > 0).sum()
    for hook in hooks:
        hook.remove()
    return (total / count.clamp(min=1)).numpy()


def _noting(inputs: dict[int, torch.Tensor], ordinal: int) -> Callable:
    def hook(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        inputs[ordinal] = arguments[0]

    return hook
