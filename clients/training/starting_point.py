"""Starting point of a round of local training, and the change of units since."""

from __future__ import annotations

import torch
from torch import Tensor

from models.graph.runtime_settings import residents
from models.graph.unit_vectors import Unit, flatten_weights, read_routing, read_unit, write_routing
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


class StartingPoint:
    """Global model at the start of a round: experts on disk and a copy of the routing.

    Args:
        model: graph with its experts on disk, before residents are materialized.
    """

    def __init__(self, model: FedGraftForCausalLM) -> None:
        layers = model.expert_layers()
        self._storages = [layer.storage for layer in layers]
        self._routing = [
            [read_routing(layer, expert) for expert in range(layer.num_experts)] for layer in layers
        ]

    def unit(self, unit: Unit) -> Tensor:
        """Vector ``[size]`` of a unit at the start."""
        layer, expert = unit
        return torch.cat([flatten_weights(*self._storages[layer].read(expert)), self._routing[layer][expert]])

    def routing_change(self, model: FedGraftForCausalLM, unit: Unit) -> Tensor:
        """Change of the routing ``[d + 1 + 2E]`` of one expert."""
        layer, expert = unit
        return read_routing(model.expert_layer(layer), expert) - self._routing[layer][expert]

    def change(self, model: FedGraftForCausalLM, unit: Unit) -> Tensor:
        """Change of a resident unit ``[size]`` of the trained ``model``."""
        return read_unit(model, unit).sub_(self.unit(unit))

    def restore_others(self, model: FedGraftForCausalLM) -> None:
        """Restore the routing of non-resident experts, since weight decay applies to whole tensors."""
        for layer, held, start in zip(model.expert_layers(), residents(model), self._routing, strict=True):
            for expert in (~held).nonzero().flatten().tolist():
                write_routing(layer, expert, start[expert])


def resident_units(model: FedGraftForCausalLM) -> list[Unit]:
    """Units of the resident experts, in order."""
    return [
        (index, int(expert))
        for index, held in enumerate(residents(model))
        for expert in held.nonzero().flatten()
    ]
