"""4-bit NF4 linear layers with double quantisation, by bitsandbytes, on CPU and CUDA.

Method: QLoRA (Dettmers et al. 2023, arXiv:2305.14314), section 3: a frozen base in 4 bits under trained LoRA factors.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from models.precision import bf16_is_faster

# It warns twice of a kernel for inference that it cannot fetch and that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype of matrix products with 4-bit weights: bf16 where the device gains from it, else fp32."""
    return torch.bfloat16 if bf16_is_faster(torch.device(device).type) else torch.float32


def quantised_linear(
    weight: Tensor, *, dtype: torch.dtype, device: torch.device | str, bias: Tensor | None = None
) -> nn.Linear:
    """A frozen ``Linear4bit`` that holds ``weight [out, in]`` as NF4.

    Args:
        weight: in any floating dtype, on any device; not kept.
        dtype: of the matrix product.
        device: where the layer lives.
        bias: ``[out]``, kept as it is.
    """
    # Imported here: it takes seconds, and most runs quantise nothing.
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    values: Any = Params4bit(weight.detach(), requires_grad=False, quant_type="nf4", module=layer)
    layer.weight = values.to(device)
    layer.weight.quant_state.dtype = dtype  # of the dequantised weight in the backward pass
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(device, copy=True), requires_grad=False)
    _keep_packing(layer)
    return layer


def weight_of(linear: nn.Module) -> Tensor:
    """The weight ``[out, in]`` of a linear layer, under LoRA or not; dequantised where it is 4-bit."""
    weight = base_of(linear).weight
    if not is_quantised(linear):
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def is_quantised(linear: nn.Module) -> bool:
    """Whether the weight of a linear layer is 4-bit."""
    return getattr(base_of(linear).weight, "quant_state", None) is not None


def base_of(linear: nn.Module) -> Any:
    """The linear layer under its LoRA factors, if it has any."""
    return getattr(linear, "base_layer", linear)


def quantisation_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers needs to load a dense model as NF4, its products in ``dtype``."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_trainable(model: nn.Module) -> nn.Module:
    """Let the 4-bit layers of a model be trained after they were evaluated, in place."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            _keep_packing(module)
    return model


def _keep_packing(layer: Any) -> None:
    # On CPUs with AVX512-BF16, evaluation would repack the weight for good: its scales rounded to bf16, no gradient
    # to the layer's input from then on, and an assertion that fails unless 32 divides the output width.
    layer.support_avx512bf16_for_cpu = False
