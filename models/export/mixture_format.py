"""Mixtures of experts of transformers that an expert graph is exported as: classes, configuration, output weights.

Shape suffixes: D hidden width, S shared neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from configs.choices import ExportFormat
from models.export.flat_layer import FlatLayer
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

# Entry of the row of Qwen2-MoE's gate of the shared expert: a sigmoid of nearly 1/2 for every token. Not zero, since
# llama.cpp computes silu(z) / z.
CONSTANT_GATE = 2.0**-20
# Neurons of zero weights of a shared expert that the format requires and the graph lacks.
LEAST_SHARED = 32


@dataclass(frozen=True)
class Shape:
    """Sizes of a mixture: routed experts, visits, neurons of a routed expert and of the shared expert."""

    experts: int
    visits: int
    neurons: int
    shared: int


@dataclass(frozen=True)
class MixtureFormat:
    """One class of mixtures of experts.

    Attributes:
        model: class of the causal language model.
        config: class of its configuration.
        settings: configuration values of a shape.
        share_of_all: whether an output weight is its expert's share among all routed experts; otherwise among those
            that a token visits.
        near_exact: whether experts are chosen by logits, so that small router rows make no ties.
        least_shared: fewest shared neurons that the format can hold; None: it has no shared expert.
        write_shared: function of the decoder layer, ``gate_up [2S, D]`` and ``down [D, S]`` that sets the shared
            expert.
    """

    model: type[PreTrainedModel]
    config: type[Any]
    settings: Callable[[FedGraftForCausalLM, Shape], dict[str, Any]]
    share_of_all: bool = False
    near_exact: bool = False
    least_shared: int | None = None
    write_shared: Callable[[Any, Tensor, Tensor], None] | None = None

    def factor(self, layer: FlatLayer) -> int:
        """Number that an output weight is the reciprocal of, where all router logits are equal."""
        return layer.num_experts if self.share_of_all else layer.top_k


def _mixtral_settings(graph: FedGraftForCausalLM, shape: Shape) -> dict[str, Any]:
    return {
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.visits,
        "intermediate_size": shape.neurons,
        "head_dim": graph.config.head_dim,
        "sliding_window": None,
    }


def _qwen_settings(graph: FedGraftForCausalLM, shape: Shape) -> dict[str, Any]:
    return {
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.visits,
        "moe_intermediate_size": shape.neurons,
        "shared_expert_intermediate_size": shape.shared,
        "intermediate_size": shape.shared,
        "head_dim": graph.config.head_dim,
        "norm_topk_prob": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
    }


def _granite_settings(graph: FedGraftForCausalLM, shape: Shape) -> dict[str, Any]:
    return {
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.visits,
        "intermediate_size": shape.neurons,
        "shared_intermediate_size": shape.shared,
        "head_dim": graph.config.head_dim,
        "attention_multiplier": graph.config.head_dim**-0.5,
        "attention_bias": graph.config.attention_bias,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
    }


@torch.no_grad()
def _write_qwen_shared(decoder: Any, gate_up_SD: Tensor, down_DS: Tensor) -> None:
    gate_SD, up_SD = gate_up_SD.chunk(2)
    block = decoder.mlp
    block.shared_expert.gate_proj.weight.copy_(gate_SD)
    block.shared_expert.up_proj.weight.copy_(up_SD)
    block.shared_expert.down_proj.weight.copy_(2 * down_DS)
    block.shared_expert_gate.weight.fill_(CONSTANT_GATE)


@torch.no_grad()
def _write_granite_shared(decoder: Any, gate_up_SD: Tensor, down_DS: Tensor) -> None:
    if decoder.shared_mlp is not None:
        decoder.shared_mlp.input_linear.weight.copy_(gate_up_SD)
        decoder.shared_mlp.output_linear.weight.copy_(down_DS)


FORMATS: dict[ExportFormat, MixtureFormat] = {
    ExportFormat.MIXTRAL: MixtureFormat(MixtralForCausalLM, MixtralConfig, _mixtral_settings),
    ExportFormat.QWEN2_MOE: MixtureFormat(
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        _qwen_settings,
        share_of_all=True,
        least_shared=LEAST_SHARED,
        write_shared=_write_qwen_shared,
    ),
    ExportFormat.GRANITE_MOE: MixtureFormat(
        GraniteMoeSharedForCausalLM,
        GraniteMoeSharedConfig,
        _granite_settings,
        near_exact=True,
        least_shared=0,
        write_shared=_write_granite_shared,
    ),
}
