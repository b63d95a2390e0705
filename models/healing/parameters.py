"""Trained parameters of healing, and their LoRA factors."""

from __future__ import annotations

from torch import nn

from configs.choices import HealedParts
from models.graph.lora import attach_attention_lora, merge_attention_lora
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

_MATRICES = (".mlp.gate_up_proj", ".mlp.down_proj")
_ROUTING = (".mlp.router.weight", ".mlp.output_gain")


def select_parameters(
    graph: FedGraftForCausalLM, train: str, *, rank: int, seed: int
) -> dict[str, nn.Parameter]:
    """Select the trained parameters by name; all others of the graph are frozen.

    ``defaults``: default outputs, norms, routers and output gains. ``lora``: these and LoRA factors of the attention
    projections, which are added. ``experts``: these and the matrices of the experts. ``all``: these and the attention
    projections. Embedding, output head, edge gains and affinities never train.

    Args:
        graph: graph with fused experts in fp32, changed in place.
        train: see ``configs.choices.HealedParts``.
        rank: rank of the LoRA factors.
        seed: seed of their initial values.
    """
    if train == HealedParts.LORA:
        attach_attention_lora(graph, rank=rank, alpha=rank, seed=seed)
    chosen = {name: value for name, value in graph.named_parameters() if _is_trained(name, train)}
    for name, value in graph.named_parameters():
        value.requires_grad_(name in chosen)
    return chosen


def finish_parameters(graph: FedGraftForCausalLM) -> None:
    """Add the products of the LoRA factors to the weights, and remove the factors; without factors nothing changes."""
    merge_attention_lora(graph)
    graph.requires_grad_(False)


def _is_trained(name: str, train: str) -> bool:
    if ".lora_" in name:
        return True
    if ".mlp.default." in name or name.endswith(_ROUTING) or name.endswith("norm.weight"):
        return True
    if name.endswith(_MATRICES):
        return train in (HealedParts.EXPERTS, HealedParts.ALL)
    return ".self_attn." in name and train == HealedParts.ALL
