"""Dense model of an expert graph with its deviation from it, for tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.export.dense import dense_model, not_representable
from models.graph.runtime_settings import visiting
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


@dataclass(frozen=True)
class DenseExport:
    """Dense model of an expert graph and its deviation from it.

    Attributes:
        model: dense Llama.
        not_representable: properties of the graph that a dense Llama lacks, one line each; empty if exact.
        max_logit_difference: largest absolute difference to the graph's logits with every expert active.
    """

    model: PreTrainedModel
    not_representable: list[str]
    max_logit_difference: float

    @property
    def exact(self) -> bool:
        """Whether the dense model equals the graph with every expert active, up to rounding."""
        return not self.not_representable


@torch.no_grad()
def export_dense(graph: FedGraftForCausalLM, *, probe_tokens: int = 256, seed: int = 0) -> DenseExport:
    """Build the dense model of a graph and compare the logits of random tokens.

    Args:
        graph: any expert graph.
        probe_tokens: number of random tokens for the comparison of logits, in fp32.
        seed: seed of these tokens.
    """
    dense = dense_model(graph)
    difference = _logit_difference(graph, dense, probe_tokens, seed)
    return DenseExport(dense, not_representable(graph), difference)


def _logit_difference(graph: FedGraftForCausalLM, dense: PreTrainedModel, tokens: int, seed: int) -> float:
    length = min(tokens, graph.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(graph.config.vocab_size, (1, length), generator=generator)
    expected = _fp32_logits(graph, ids)
    return float((expected - _fp32_logits(dense, ids)).abs().max())


def _fp32_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits with every expert active, from an fp32 copy: bf16 rounding errors are far above 1e-4."""
    exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    wide = model if exact else copy.deepcopy(model).float()
    if not isinstance(wide, FedGraftForCausalLM):
        return wide(input_ids=ids).logits
    with visiting(wide, wide.config.num_experts):
        return wide(input_ids=ids).logits
