"""Root mean square of the gradient of each entry of a unit, from the optimizer state of local training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from clients.training.starting_point import resident_units
from federated.updates.lazy_vectors import LazyVectors
from models.graph.unit_vectors import Unit, flatten_weights
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


def second_moments(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """Adam's running mean of the squared gradient of each parameter; empty for other optimizers.

    A change by sgd is proportional to the gradient already, and Adafactor stores only means over rows and columns.
    """
    states = optimizer.state
    if not all("exp_avg_sq" in state for state in states.values()):
        return {}
    return {parameter: state["exp_avg_sq"] for parameter, state in states.items()}


def entry_gradient_rms(model: FedGraftForCausalLM, moments: Mapping[Tensor, Tensor]) -> Mapping[Unit, Tensor]:
    """Root mean square of the gradient of each entry ``[size]`` of the units that ``model`` holds.

    Zero for entries that did not train. Empty without moments, and for LoRA, whose factors do not have the entries of
    the unit.

    Args:
        model: model after local training.
        moments: result of ``second_moments``.
    """
    layers = model.expert_layers()
    if not any(parameter in moments for layer in layers for parameter in layer.parameters()) or any(
        ".lora_" in name for name, _ in model.named_parameters()
    ):
        return {}
    return LazyVectors(resident_units(model), lambda unit: _unit_rms(layers[unit[0]], unit[1], moments))


def _unit_rms(layer: ExpertGraphMLP, expert: int, moments: Mapping[Tensor, Tensor]) -> Tensor:
    matrices = {"gate_up_proj": layer.gate_up_proj, "down_proj": layer.down_proj}
    parameters = matrices | layer.routing_parameters()

    def moment(name: str) -> Tensor:
        parameter = parameters[name]
        return moments[parameter] if parameter in moments else torch.zeros_like(parameter)

    row = layer.held.index(expert)
    weights = flatten_weights(moment("gate_up_proj")[row], moment("down_proj")[row])
    routing = (
        moment("router")[expert],
        moment("output_gain")[expert],
        moment("edge_gain")[:, expert],
        moment("edge_affinity")[:, expert],
    )
    return torch.cat([weights, *(part.reshape(-1).float().cpu() for part in routing)]).sqrt()
