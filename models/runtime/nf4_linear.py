"""4-bit linear layer of bitsandbytes without two of its faults on CPUs, so that all devices compute the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor

_BLOCK = 64  # entries that share a scale


class NF4Linear(Linear4bit):
    """``Linear4bit`` with a frozen NF4 weight.

    On a CPU, bitsandbytes 0.50 unpacks the weight with the wrong scales where 64 does not divide its input width (the
    scales belong to blocks of the flattened weight, its kernel starts a new block in every row); and, on CPUs with
    AVX512-BF16, evaluation repacks the weight permanently, after which no gradient reaches the layer's input. On CPUs,
    and for widths that 64 does not divide, this layer unpacks the flattened weight and multiplies it in torch.

    Args:
        weight: quantized weight.
        shape: ``(out, in)`` of the weight.
        dtype: dtype of the matrix product.
        bias: ``[out]``, or None.
    """

    def __init__(
        self, weight: Params4bit, shape: torch.Size, dtype: torch.dtype, bias: torch.nn.Parameter | None
    ):
        super().__init__(shape[1], shape[0], bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
        self.weight, self.quant_state = weight, weight.quant_state
        self.register_parameter("bias", bias)
        weight.module = self

    def dequantized(self) -> Tensor:
        """Dequantized weight ``[out, in]`` in the dtype of the matrix product."""
        state = copy.copy(self.weight.quant_state)
        rows = state.shape.numel() // _BLOCK if state.shape.numel() % _BLOCK == 0 else 1
        state.shape, state.dtype = torch.Size([rows, state.shape.numel() // rows]), self.compute_dtype
        return dequantize_4bit(self.weight.data, state).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``, in the dtype of ``x``; only ``x`` receives a gradient."""
        if x.device.type != "cpu" and self.in_features % _BLOCK == 0:
            return super().forward(x)
        return _Product.apply(x.to(self.compute_dtype), self).to(x.dtype)


class _Product(torch.autograd.Function):
    """``x W^T + bias`` whose backward pass unpacks ``W`` again, so that only the packed weight is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized(), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantized().to(grad.dtype), None
