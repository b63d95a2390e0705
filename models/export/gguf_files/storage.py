"""Types of the tensors of a GGUF file, and the values that they keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor
from transformers import PreTrainedModel

from configs.choices import ExportedWeights

_TYPES = {
    ExportedWeights.FP32: GGMLQuantizationType.F32,
    ExportedWeights.BF16: GGMLQuantizationType.BF16,
    ExportedWeights.FP16: GGMLQuantizationType.F16,
    ExportedWeights.Q8_0: GGMLQuantizationType.Q8_0,
}
# Weights per block of Q8_0, a divisor of the row length.
_BLOCK = 32
# Ends of the names of parameters that stay in fp32: routers and the gate of a shared expert.
_EXACT = ("mlp.gate.weight", "shared_expert_gate.weight")


def stored_type(name: str, shape: Sequence[int], weights: ExportedWeights) -> GGMLQuantizationType:
    """GGUF type of a parameter: fp32 for vectors and routers, fp16 for rows that Q8_0 cannot divide.

    Args:
        name: name of the parameter in transformers.
        shape: its shape.
        weights: wanted type.
    """
    if len(shape) < 2 or name.endswith(_EXACT):
        return GGMLQuantizationType.F32
    if weights == ExportedWeights.Q8_0 and shape[-1] % _BLOCK:
        return GGMLQuantizationType.F16
    return _TYPES[weights]


def encode(values: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Bytes or numbers of a tensor in a GGUF type."""
    numbers = values.detach().float().contiguous().numpy()
    return numbers if kind == GGMLQuantizationType.F32 else quants.quantize(numbers, kind)


@torch.no_grad()
def round_to_gguf(model: PreTrainedModel, weights: ExportedWeights) -> None:
    """Round the parameters of a model in fp32 to the values that a GGUF file keeps, in place."""
    seen: set[Any] = set()
    for name, parameter in model.named_parameters():
        kind = stored_type(name, parameter.shape, weights)
        if kind == GGMLQuantizationType.F32 or parameter in seen:
            continue
        seen.add(parameter)
        parameter.copy_(torch.from_numpy(quants.dequantize(encode(parameter, kind), kind)).view_as(parameter))
