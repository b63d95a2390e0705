"""Conversion between the attention projections of a layer and the vector that clients ship if they train attention.

The vector holds the weights of the query, key, value and output projections, ``[out, in]`` each, flattened in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.runtime.memory import return_freed_memory
from models.runtime.nf4 import base_of, is_quantized, quantized_linear, weight_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def projections(model: FedGraftForCausalLM, layer: int) -> list[nn.Module]:
    """The four projections of a layer, including LoRA factors."""
    return [getattr(model.model.layers[layer].self_attn, name) for name in PROJECTIONS]


def attention_count(model: FedGraftForCausalLM, layer: int) -> int:
    """Size of the vector of a layer."""
    return sum(_size(linear) for linear in projections(model, layer))


@torch.no_grad()
def read_attention(model: FedGraftForCausalLM, layer: int) -> Tensor:
    """Copy of the layer's vector, fp32 ``[size]`` on the CPU, without LoRA; dequantized if it is 4-bit."""
    return flatten_projections(weight_of(linear) for linear in projections(model, layer))


@torch.no_grad()
def write_attention(model: FedGraftForCausalLM, layer: int, vector: Tensor) -> None:
    """Set the layer's projections from its vector ``[size]``.

    Raises:
        ValueError: the vector has another size, or the projections are quantized.
    """
    linears = projections(model, layer)
    sizes = [_size(linear) for linear in linears]
    if vector.numel() != sum(sizes):
        raise ValueError(f"attention of layer {layer}: expected {sum(sizes)} entries, got {vector.numel()}")
    if any(is_quantized(linear) for linear in linears):
        raise ValueError(
            f"attention of layer {layer} is 4-bit and cannot be written; write it before it is quantized"
        )
    for linear, part in zip(linears, vector.split(sizes), strict=True):
        weight = base_of(linear).weight
        weight.copy_(part.view_as(weight))


def flatten_projections(weights: Iterable[Tensor]) -> Tensor:
    """Flatten the matrices of the four projections to one fp32 vector on the CPU."""
    return torch.cat([weight.reshape(-1).float().cpu() for weight in weights])


def quantize_attention(model: FedGraftForCausalLM, dtype: torch.dtype) -> None:
    """Quantize the attention projections of every layer to 4 bits, in place; matrix products in ``dtype``."""
    for layer in model.model.layers:
        for name in PROJECTIONS:
            linear = getattr(layer.self_attn, name)
            quantized = quantized_linear(
                linear.weight, bias=linear.bias, dtype=dtype, device=linear.weight.device
            )
            setattr(layer.self_attn, name, quantized)
        return_freed_memory()


def _size(linear: Any) -> int:
    base = base_of(linear)
    return base.in_features * base.out_features
