"""4-bit NF4 linear layers with double quantization, by bitsandbytes, on CPU and CUDA.

Method: QLoRA (Dettmers et al. 2023, arXiv:2305.14314), section 3: a frozen base in 4 bits under trained LoRA factors.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from models.runtime.precision import bf16_is_faster

# Silences two warnings about an inference kernel that is not installed and not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """Dtype of matrix products with 4-bit weights: bf16 if it is faster on the device, else fp32."""
    return torch.bfloat16 if bf16_is_faster(torch.device(device).type) else torch.float32


def quantized_linear(
    weight: Tensor, *, dtype: torch.dtype, device: torch.device | str, bias: Tensor | None = None
) -> nn.Linear:
    """Quantize ``weight [out, in]`` to a frozen ``NF4Linear``.

    Args:
        weight: any floating dtype, on any device; copied.
        dtype: dtype of the matrix product.
        device: device of the layer.
        bias: ``[out]``, copied.
    """
    # Imported here and below: the import takes seconds, and most runs do not quantize.
    from bitsandbytes.nn import Params4bit

    from models.runtime.nf4_linear import NF4Linear

    values: Any = Params4bit(weight.detach(), requires_grad=False, quant_type="nf4")
    if bias is not None:
        bias = nn.Parameter(bias.detach().to(device, dtype, copy=True), requires_grad=False)
    return NF4Linear(values.to(device), weight.shape, dtype, bias)


def weight_of(linear: nn.Module) -> Tensor:
    """Base weight ``[out, in]`` of a linear layer with or without LoRA; dequantized if it is 4-bit."""
    base = base_of(linear)
    return base.dequantized() if is_quantized(base) else base.weight.detach()


def is_quantized(linear: nn.Module) -> bool:
    """Whether the weight of a linear layer is 4-bit."""
    return getattr(base_of(linear).weight, "quant_state", None) is not None


def base_of(linear: nn.Module) -> Any:
    """Linear layer without its LoRA factors."""
    return getattr(linear, "base_layer", linear)


def quantization_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Configuration for transformers to load a dense model as NF4, with matrix products in ``dtype``."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def replace_linear4bit(model: nn.Module) -> nn.Module:
    """Replace the 4-bit layers that transformers loads by ``NF4Linear``, in place; the packed weights are shared."""
    from bitsandbytes.nn import Linear4bit

    from models.runtime.nf4_linear import NF4Linear

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit) and not isinstance(module, NF4Linear):
            shape = torch.Size([module.out_features, module.in_features])
            model.set_submodule(name, NF4Linear(module.weight, shape, module.compute_dtype, module.bias))
    return model
