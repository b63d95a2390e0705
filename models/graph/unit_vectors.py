"""Conversion between the parameters of an expert and the vector that clients ship and the server aggregates.

A unit is ``(layer, expert)``, or ``(layer, OTHERS)`` for the attention projections of a layer (see
``attention_vectors``). The vector of an expert is ``[3h, d]`` flattened (gate rows, up rows, rows of the transposed
down projection), then the router row ``[d]``, the output gain ``[1]``, and the columns of edge gains and edge
affinities that end in the expert, ``[E]`` each: its routing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from configs.run_views import Trained
from models.graph.attention_vectors import attention_count, read_attention, write_attention
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

Unit = tuple[int, int]
OTHERS = -1


class Span(NamedTuple):
    """Entries ``start`` to ``stop`` of a vector of ``size`` entries."""

    start: int
    stop: int
    size: int


def unit_sizes(model: FedGraftForCausalLM, *, attention: bool = False) -> dict[Unit, int]:
    """Vector size of each expert and, with ``attention``, of the attention of each layer."""
    layers = model.expert_layers()
    sizes = {
        (index, expert): weight_count(layer) + routing_count(layer)
        for index, layer in enumerate(layers)
        for expert in range(layer.num_experts)
    }
    if attention:
        sizes |= {(index, OTHERS): attention_count(model, index) for index in range(len(layers))}
    return sizes


def trained_spans(model: FedGraftForCausalLM, train: Trained, *, attention: bool = False) -> dict[Unit, Span]:
    """Trained entries of each unit of ``unit_sizes``.

    Args:
        model: graph.
        train: ``all``, ``experts`` (matrices only) or ``routing`` (routers, gains and affinities only).
        attention: whether attention projections train, too.
    """
    layers, spans = model.expert_layers(), {}
    for unit, size in unit_sizes(model, attention=attention).items():
        matrices = weight_count(layers[unit[0]]) if unit[1] != OTHERS else size
        start, stop = (matrices if train == "routing" else 0), (matrices if train == "experts" else size)
        spans[unit] = Span(start, stop, size)
    return spans


def unit_shapes(model: FedGraftForCausalLM) -> dict[Unit, tuple[int, int]]:
    """Shape ``(3h, d)`` of the matrix at the start of each expert's vector."""
    return {
        (index, expert): (3 * layer.expert_size, layer.hidden_size)
        for index, layer in enumerate(model.expert_layers())
        for expert in range(layer.num_experts)
    }


def weight_count(layer: ExpertGraphMLP) -> int:
    """Number of entries of one expert's matrices, ``3hd``."""
    return 3 * layer.expert_size * layer.hidden_size


def routing_count(layer: ExpertGraphMLP) -> int:
    """Number of entries of one expert's routing, ``d + 1 + 2E``."""
    return layer.hidden_size + 1 + 2 * layer.num_experts


@torch.no_grad()
def read_unit(model: FedGraftForCausalLM, unit: Unit) -> Tensor:
    """Copy of the unit's vector, fp32 ``[size]`` on the CPU.

    Raises:
        ValueError: the model does not hold this expert.
    """
    layer, expert = model.expert_layer(unit[0]), unit[1]
    if expert == OTHERS:
        return read_attention(model, unit[0])
    return torch.cat([flatten_weights(*layer.read_expert(expert)), read_routing(layer, expert)])


@torch.no_grad()
def write_unit(model: FedGraftForCausalLM, unit: Unit, vector: Tensor) -> None:
    """Set the unit's parameters from its vector ``[size]``.

    Raises:
        ValueError: the vector has another size, or the model does not hold this expert.
    """
    layer, expert = model.expert_layer(unit[0]), unit[1]
    if expert == OTHERS:
        write_attention(model, unit[0], vector)
        return
    counts = [weight_count(layer), routing_count(layer)]
    if vector.numel() != sum(counts):
        raise ValueError(f"unit {unit}: expected {sum(counts)} entries, got {vector.numel()}")
    weights, routing = vector.split(counts)
    layer.write_expert(expert, *unflatten_weights(weights, layer.hidden_size))
    write_routing(layer, expert, routing)


def add_to_unit(model: FedGraftForCausalLM, unit: Unit, step: Tensor) -> None:
    """Add ``step [size]`` to the unit's parameters, in fp32.

    Server and clients both use this addition, so that their copies stay equal bit for bit.
    """
    write_unit(model, unit, read_unit(model, unit) + step)


def flatten_weights(gate_up: Tensor, down: Tensor) -> Tensor:
    """Flatten ``gate_up [2h, d]`` and ``down [d, h]`` to one fp32 vector ``[3hd]`` on the CPU."""
    return torch.cat([part.reshape(-1).float().cpu() for part in (gate_up, down.T)])


def unflatten_weights(vector: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    """Split a vector ``[3hd]`` into ``gate_up [2h, d]`` and ``down [d, h]``, the inverse of ``flatten_weights``."""
    rows = vector.view(-1, hidden_size)
    gate_up, down = rows.split([2 * len(rows) // 3, len(rows) // 3])
    return gate_up, down.T


@torch.no_grad()
def read_routing(layer: ExpertGraphMLP, expert: int) -> Tensor:
    """Router row, output gain, and incoming gains and affinities of an expert, fp32 ``[d + 1 + 2E]``."""
    parts = (
        layer.router.weight[expert],
        layer.output_gain[expert],
        layer.edge_gain[:, expert],
        layer.edge_affinity[:, expert],
    )
    return torch.cat([part.reshape(-1).float().cpu() for part in parts])


@torch.no_grad()
def write_routing(layer: ExpertGraphMLP, expert: int, vector: Tensor) -> None:
    """Set the routing of an expert from its vector ``[d + 1 + 2E]``, the inverse of ``read_routing``."""
    counts = [layer.hidden_size, 1, layer.num_experts, layer.num_experts]
    router, output, gain, affinity = vector.split(counts)
    layer.router.weight[expert] = router.to(layer.router.weight)
    layer.output_gain[expert] = output[0].to(layer.output_gain)
    layer.edge_gain[:, expert] = gain.to(layer.edge_gain)
    layer.edge_affinity[:, expert] = affinity.to(layer.edge_affinity)
