"""Features of FFN neurons for k-means, and the expert of each neuron in a partition."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def neuron_features(mlp: nn.Module, kind: str, profile: Tensor) -> np.ndarray:
    """Features of each neuron for k-means, ``[m, F]`` fp32.

    ``gate``, ``up`` and ``down`` are the neuron's weights, ``gate+up`` and ``joint`` (all three) concatenations,
    ``activation`` and ``gate-activation`` its activations, or those of its gate, on calibration tokens
    (``profile [m, P]``), scaled to unit length.
    """
    weights = {
        "gate": mlp.gate_proj.weight,
        "up": mlp.up_proj.weight,
        "down": mlp.down_proj.weight.T,
    }
    if kind in ("activation", "gate-activation"):
        return nn.functional.normalize(profile.float(), dim=-1).numpy()
    names = {"gate+up": ("gate", "up"), "joint": ("gate", "up", "down")}.get(kind, (kind,))
    return torch.cat([weights[name].detach().float().cpu() for name in names], dim=-1).numpy()


def experts_of_neurons(members_EH: Tensor) -> Tensor:
    """Expert of each neuron, int64 ``[m]``, from the neurons ``[E, H]`` of each expert."""
    experts_m = torch.empty(members_EH.numel(), dtype=torch.int64)
    experts_m[members_EH.flatten()] = torch.arange(len(members_EH)).repeat_interleave(members_EH.shape[1])
    return experts_m
