"""Hash of a copy of the global model, over everything that may differ from the bootstrapped checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from models.graph.attention_vectors import read_attention
from models.graph.graph_state import read_graph
from models.graph.unit_vectors import OTHERS, Unit, flatten_weights
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

_DIGEST_BYTES = 16


def vector_digest(vector: Tensor) -> str:
    """BLAKE2b digest of the bits of an fp32 vector ``[size]`` on the CPU."""
    return hashlib.blake2b(_bits(vector), digest_size=_DIGEST_BYTES).hexdigest()


def unit_digest(model: FedGraftForCausalLM, unit: Unit) -> str:
    """Digest of ``moved_vector``."""
    return vector_digest(moved_vector(model, unit))


@torch.no_grad()
def moved_vector(model: FedGraftForCausalLM, unit: Unit) -> Tensor:
    """Matrices of an expert, or attention projections of a layer, fp32 ``[size]``; without routing."""
    layer, expert = unit
    if expert == OTHERS:
        return read_attention(model, layer)
    return flatten_weights(*model.expert_layer(layer).read_expert(expert))


def copy_hash(model: FedGraftForCausalLM, moved: Mapping[Unit, str]) -> str:
    """Digest of a copy of the global model: equal if and only if copies are equal bit for bit.

    Args:
        model: copy; its graph and routing are hashed in full.
        moved: digest of each unit that ever moved, so that only units that move are hashed again.
    """
    state = hashlib.blake2b(read_graph(model).digest().encode(), digest_size=_DIGEST_BYTES)
    for layer in model.expert_layers():
        state.update(_bits(routing_vector(layer)))
    for unit in sorted(moved):
        state.update(f"{unit[0]}.{unit[1]} {moved[unit]}\n".encode())
    return state.hexdigest()


@torch.no_grad()
def routing_vector(layer: ExpertGraphMLP) -> Tensor:
    """Router, gains and affinities of a layer, concatenated, fp32 on the CPU."""
    return torch.cat([each.reshape(-1).float().cpu() for each in layer.routing_parameters().values()])


def _bits(vector: Tensor) -> memoryview:
    return vector.contiguous().view(torch.uint8).numpy().data
