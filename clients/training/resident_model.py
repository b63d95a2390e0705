"""Resident part of the global model: loading it for training, and its change by training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clients.training.starting_point import StartingPoint, resident_units
from configs.run_views import Adapters
from federated.updates.lazy_vectors import LazyVectors
from models.checkpoints.disk_experts import materialize
from models.graph.expert_modules import materialize_modules
from models.graph.lora import attach_lora, attention_changes, lora_change
from models.graph.unit_vectors import OTHERS, Unit
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


def hold_residents(
    model: FedGraftForCausalLM, residents: Sequence[Tensor | None], adapters: Adapters, *, seed: int
) -> None:
    """Read only the resident experts from disk, as trainable matrices or as fixed weights with LoRA factors.

    Args:
        model: graph with its experts on disk.
        residents: per layer bool ``[E]``; None: all.
        adapters: whether matrices train, or LoRA factors on fixed weights of some precision.
        seed: seed of the factors.
    """
    if not adapters.lora_rank:
        materialize(model, residents)
        return
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": None}[adapters.weights]
    materialize_modules(model, residents, kind="nf4" if adapters.weights == "nf4" else "plain", dtype=dtype)
    attach_lora(
        model,
        rank=adapters.lora_rank,
        alpha=adapters.lora_alpha,
        attention=adapters.attention_lora,
        seed=seed,
    )


def changes(model: FedGraftForCausalLM, start: StartingPoint, adapters: Adapters) -> Mapping[Unit, Tensor]:
    """Change of each resident unit ``[size]`` since ``start``, computed on access.

    With LoRA the change of a matrix is the product of its factors: a mean of products is exact, whereas the product of
    mean factors is not the mean of the products.
    """
    units = resident_units(model)
    if not adapters.lora_rank:
        return LazyVectors(units, lambda unit: start.change(model, unit))
    # Attention is small compared with the experts.
    attention = {(layer, OTHERS): change for layer, change in attention_changes(model)}

    def change(unit: Unit) -> Tensor:
        if unit in attention:
            return attention[unit]
        return torch.cat([lora_change(model, unit), start.routing_change(model, unit)])

    return LazyVectors([*units, *attention], change)
