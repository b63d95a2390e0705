"""Tensors of a GGUF file from the parameters of a Llama, a Mixtral or a Qwen2-MoE."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias|gate_up_proj|down_proj)")
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}


class NamedTensor(NamedTuple):
    """Tensor of a GGUF file: its name there, that of its parameter, and its values."""

    name: str
    parameter: str
    values: Tensor


def gguf_tensors(model: PreTrainedModel, *, interleaved: bool) -> Iterator[NamedTensor]:
    """Tensors of a model under the names of llama.cpp.

    Args:
        model: opened Llama, Mixtral or Qwen2-MoE.
        interleaved: whether the architecture pairs neighbouring rows of a head in its rotary embedding; transformers
            pairs rows of its two halves.
    """
    heads = {
        "attn_q": model.config.num_attention_heads,
        "attn_k": model.config.num_key_value_heads,
    }
    for parameter, values in model.state_dict().items():
        if parameter in _WHOLE:
            yield NamedTensor(_WHOLE[parameter], parameter, values)
            continue
        for name, part in _layer_tensors(parameter, values):
            stem = name.split(".")[2]
            moved = interleaved and stem in heads
            yield NamedTensor(name, parameter, interleave(part, heads[stem]) if moved else part)
    if (factors := rope_factors(model.config)) is not None:
        yield NamedTensor("rope_freqs.weight", "", factors)


def _layer_tensors(parameter: str, values: Tensor) -> Iterator[tuple[str, Tensor]]:
    match = _LAYER.fullmatch(parameter)
    known = (*_IN_LAYER, "mlp.experts")
    if match is None or match[2] not in known:
        raise ValueError(f"expected a parameter of a Llama, a Mixtral or a Qwen2-MoE, got {parameter}")
    layer, module, kind = match.groups()
    if kind == "gate_up_proj":
        for stem, part in zip(("ffn_gate_exps", "ffn_up_exps"), values.chunk(2, dim=1), strict=True):
            yield f"blk.{layer}.{stem}.weight", part
    elif kind == "down_proj":
        yield f"blk.{layer}.ffn_down_exps.weight", values
    else:
        # One row is stored as a vector.
        part = values[0] if module.endswith("shared_expert_gate") else values
        yield f"blk.{layer}.{_IN_LAYER[module]}.{kind}", part


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows (or biases) of a query or key projection with the two rotary halves of each head interleaved."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def head_width(config: Any) -> int:
    """Width of one attention head: ``head_dim`` where a configuration has it, else ``hidden_size`` over the heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_factors(config: Any) -> Tensor | None:
    """Divisors of the rotary frequencies, fp32, that the Llama-3 scaling applies; None for other rotary embeddings."""
    rope: Mapping[str, Any] = config.rope_parameters
    if rope.get("rope_type", "default") != "llama3":
        return None
    width = head_width(config)
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)
