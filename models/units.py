"""The parameters of one expert as one vector, and back: what clients ship and the server aggregates.

A unit is ``(layer, expert)``. Its vector is ``[3h, d]`` flattened (gate rows, up rows, rows of the transposed
down projection), then the router row ``[d]``, the output gain ``[1]``, and the columns of edge gains and edge
affinities that end in the expert, ``[E]`` each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.experts_fedgraft import ExpertGraphMLP
from models.modeling_fedgraft import FedGraftForCausalLM

Unit = tuple[int, int]


def unit_sizes(model: FedGraftForCausalLM) -> dict[Unit, int]:
    """Entries of the vector of each unit."""
    return {
        (index, expert): _size(layer)
        for index, layer in enumerate(model.expert_layers())
        for expert in range(layer.num_experts)
    }


@torch.no_grad()
def read_unit(model: FedGraftForCausalLM, unit: Unit) -> Tensor:
    """A copy of the unit's vector, fp32 ``[size]`` on the CPU."""
    layer, expert = model.expert_layers()[unit[0]], unit[1]
    parts = (
        layer.gate_up_proj[expert],
        layer.down_proj[expert].T,
        layer.router[expert],
        layer.output_gain[expert],
        layer.edge_gain[:, expert],
        layer.edge_affinity[:, expert],
    )
    return torch.cat([part.reshape(-1).float().cpu() for part in parts])


@torch.no_grad()
def write_unit(model: FedGraftForCausalLM, unit: Unit, vector: Tensor) -> None:
    """Set the unit's parameters from its vector ``[size]``.

    Raises:
        ValueError: the vector has another size.
    """
    layer, expert = model.expert_layers()[unit[0]], unit[1]
    if vector.numel() != _size(layer):
        raise ValueError(f"unit {unit}: expected {_size(layer)} entries, got {vector.numel()}")
    hidden, width = layer.down_proj.shape[1:]
    counts = [2 * width * hidden, width * hidden, hidden, 1, layer.num_experts, layer.num_experts]
    gate_up, down, router, output, gain, affinity = vector.split(counts)
    layer.gate_up_proj[expert] = gate_up.view(2 * width, hidden).to(layer.gate_up_proj)
    layer.down_proj[expert] = down.view(width, hidden).T.to(layer.down_proj)
    layer.router[expert] = router.to(layer.router)
    layer.output_gain[expert] = output[0].to(layer.output_gain)
    layer.edge_gain[:, expert] = gain.to(layer.edge_gain)
    layer.edge_affinity[:, expert] = affinity.to(layer.edge_affinity)


def add_to_unit(model: FedGraftForCausalLM, unit: Unit, step: Tensor) -> None:
    """Add ``step [size]`` to the unit's parameters, in fp32.

    Server and clients move their experts by this one addition, so that they stay equal bit for bit.
    """
    write_unit(model, unit, read_unit(model, unit) + step)


def _size(layer: ExpertGraphMLP) -> int:
    hidden, width = layer.down_proj.shape[1:]
    return 3 * width * hidden + hidden + 1 + 2 * layer.num_experts
