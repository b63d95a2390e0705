"""LoRA factors on experts and attention, and their products as dense updates.

Clients ship the product of their factors, in the layout of the weights, because factors of several clients cannot be
averaged: the mean of products is not the product of means.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.graph.attention_vectors import flatten_projections, projections
from models.graph.expert_modules import ExpertModules
from models.graph.unit_vectors import Unit, flatten_weights
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

_ADAPTER = "default"
_EXPERTS = r"model\.layers\.\d+\.mlp\.storage\.experts\.\d+\.(gate_up|down)"
_ATTENTION = r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"


def attach_lora(
    model: FedGraftForCausalLM,
    *,
    rank: int,
    alpha: float,
    attention: bool = False,
    routing: bool = True,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Add fp32 LoRA factors to every expert module, and freeze all other parameters except routing.

    Args:
        model: graph after ``materialize_modules``, changed in place.
        rank: rank of the factors.
        alpha: scale; the product of the factors is multiplied by ``alpha / rank``.
        attention: add factors to the attention projections, too.
        routing: leave routers, gains and affinities trainable.
        seed: seed of the initial values of A; B starts at zero.

    Returns:
        The trainable parameters.

    Raises:
        ValueError: fused experts.
    """
    if not all(isinstance(layer.storage, ExpertModules) for layer in model.expert_layers()):
        raise ValueError("expected experts as modules, got fused ones; call materialize_modules first")
    _inject(model, f"{_EXPERTS}|{_ATTENTION}" if attention else _EXPERTS, rank, alpha, seed)
    for layer in model.expert_layers():
        for parameter in layer.routing_parameters().values():
            parameter.requires_grad_(routing)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def attach_attention_lora(model: FedGraftForCausalLM, *, rank: int, alpha: float, seed: int = 0) -> None:
    """Add fp32 LoRA factors to the attention projections; other parameters stay as they are.

    Args:
        model: graph, changed in place.
        rank: rank of the factors.
        alpha: scale; the product of the factors is multiplied by ``alpha / rank``.
        seed: seed of the initial values of A; B starts at zero.
    """
    _inject(model, _ATTENTION, rank, alpha, seed)


@torch.no_grad()
def merge_attention_lora(model: FedGraftForCausalLM) -> None:
    """Add the product of each attention projection's factors to its weight, and remove the factors."""
    for layer in model.model.layers:
        for name, module in list(layer.self_attn.named_children()):
            if hasattr(module, "get_delta_weight"):
                linear = module.get_base_layer()
                linear.weight += _change(module).to(linear.weight)
                setattr(layer.self_attn, name, linear)


def _inject(model: FedGraftForCausalLM, targets: str, rank: int, alpha: float, seed: int) -> None:
    """Add fp32 factors to the modules whose names match ``targets``; the global random state does not change."""
    # Imported here: the import takes seconds, and most runs train whole experts.
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, _ADAPTER)
    cast_adapter_dtype(model, _ADAPTER)


def lora_change(model: FedGraftForCausalLM, unit: Unit) -> Tensor:
    """LoRA update of one resident unit's weights, ``alpha / rank * B A``, fp32 ``[3hd]`` on the CPU.

    See ``models.graph.unit_vectors`` for the layout.

    Raises:
        ValueError: the model does not hold this expert.
    """
    module = model.expert_layer(unit[0]).storage.expert(unit[1])
    return flatten_weights(_change(module.gate_up), _change(module.down))


def attention_changes(model: FedGraftForCausalLM) -> Iterator[tuple[int, Tensor]]:
    """LoRA update of the attention projections of each layer, fp32 on the CPU, laid out as in ``attention_vectors``.

    Empty if attention has no factors.
    """
    for index in range(len(model.model.layers)):
        linears = projections(model, index)
        if all(hasattr(linear, "get_delta_weight") for linear in linears):
            yield index, flatten_projections(_change(linear) for linear in linears)


@torch.no_grad()
def _change(linear: nn.Module) -> Tensor:
    return linear.get_delta_weight(_ADAPTER)
