"""Where a round of local training starts from, and how far a client has moved since."""

from __future__ import annotations

import torch
from torch import Tensor

from models.graph.runtime_settings import residents
from models.graph.unit_vectors import Unit, flatten_weights, read_routing, read_unit, write_routing
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


class StartingPoint:
    """The global model as a round found it: its experts stay on disk, only the routing is copied.

    Args:
        model: opened with its experts on disk, before residents are materialized.
    """

    def __init__(self, model: FedGraftForCausalLM) -> None:
        layers = model.expert_layers()
        self._storages = [layer.storage for layer in layers]
        self._routing = [
            [read_routing(layer, expert) for expert in range(layer.num_experts)] for layer in layers
        ]

    def unit(self, unit: Unit) -> Tensor:
        """The vector ``[size]`` of a unit at the start."""
        layer, expert = unit
        return torch.cat([flatten_weights(*self._storages[layer].read(expert)), self._routing[layer][expert]])

    def routing_change(self, model: FedGraftForCausalLM, unit: Unit) -> Tensor:
        """How far the routing ``[d + 1 + 2E]`` of one expert has moved."""
        layer, expert = unit
        return read_routing(model.expert_layers()[layer], expert) - self._routing[layer][expert]

    def change(self, model: FedGraftForCausalLM, unit: Unit) -> Tensor:
        """How far a resident unit ``[size]`` of the trained ``model`` has moved."""
        return read_unit(model, unit).sub_(self.unit(unit))

    def restore_others(self, model: FedGraftForCausalLM) -> None:
        """Put back the routing of what the client does not hold: weight decay reaches whole tensors."""
        for layer, held, start in zip(model.expert_layers(), residents(model), self._routing, strict=True):
            for expert in (~held).nonzero().flatten().tolist():
                write_routing(layer, expert, start[expert])


def resident_units(model: FedGraftForCausalLM) -> list[Unit]:
    """The units that the model's residency lets it train, in order."""
    return [
        (index, int(expert))
        for index, held in enumerate(residents(model))
        for expert in held.nonzero().flatten()
    ]
