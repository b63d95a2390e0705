"""LoRA factors on experts and attention, and the dense changes that they amount to.

Factors of several clients cannot be averaged: a mean of products is not the product of means. So what a client ships
is the product of its factors, in the layout of the weights that it changes.
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
    """Put fp32 LoRA factors on every expert module, and freeze everything else but the routing.

    Args:
        model: after ``materialize_modules``, changed in place.
        rank: of the factors.
        alpha: the product of the factors counts ``alpha / rank`` times.
        attention: put factors on the attention projections too.
        routing: leave routers, gains and affinities trainable.
        seed: of the first values of A; B starts at zero.

    Returns:
        The parameters that train.

    Raises:
        ValueError: the experts are no modules.
    """
    # Imported here: it takes seconds, and most runs train whole experts.
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    if not all(isinstance(layer.storage, ExpertModules) for layer in model.expert_layers()):
        raise ValueError("expected experts as modules, got fused ones; call materialize_modules first")
    targets = f"{_EXPERTS}|{_ATTENTION}" if attention else _EXPERTS
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, _ADAPTER)
    cast_adapter_dtype(model, _ADAPTER)
    for layer in model.expert_layers():
        for parameter in layer.routing_parameters().values():
            parameter.requires_grad_(routing)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lora_change(model: FedGraftForCausalLM, unit: Unit) -> Tensor:
    """The change of one resident unit's weights, ``alpha / rank * B A``, fp32 ``[3hd]`` on the CPU.

    See ``models.graph.unit_vectors`` for the layout.

    Raises:
        ValueError: the model does not hold this expert.
    """
    module = model.expert_layers()[unit[0]].storage.expert(unit[1])
    return flatten_weights(_change(module.gate_up), _change(module.down))


def attention_changes(model: FedGraftForCausalLM) -> Iterator[tuple[int, Tensor]]:
    """For each layer the change of its attention projections, fp32 on the CPU; laid out as in ``attention_vectors``.

    Nothing where attention carries no factors.
    """
    for index in range(len(model.model.layers)):
        linears = projections(model, index)
        if all(hasattr(linear, "get_delta_weight") for linear in linears):
            yield index, flatten_projections(_change(linear) for linear in linears)


@torch.no_grad()
def _change(linear: nn.Module) -> Tensor:
    return linear.get_delta_weight(_ADAPTER)
