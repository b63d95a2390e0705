"""Layers of an expert graph as plain mixtures: shared neurons, routed experts and their router.

Shape suffixes: D hidden width, H neurons per expert, E routed experts of the layer, S shared neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs.errors import UserError
from models.remote_code.experts_fedgraft import ExpertGraphMLP


@dataclass(frozen=True, eq=False)
class FlatLayer:
    """Sum of the shared neurons and of the ``top_k`` routed experts of largest router logit.

    Attributes:
        router_ED: router rows.
        gate_up_EHD: ``[E, 2H, D]``.
        down_EDH: ``[E, D, H]``.
        shared_gate_up_SD: ``[2S, D]``; S may be 0.
        shared_down_DS: ``[D, S]``.
        top_k: routed experts that a token visits.
        padding: experts that an export adds, which no token is meant to visit; see ``equalized``.
        away_D: router row, at the scale of the export, of these experts; None without them.
    """

    router_ED: Tensor
    gate_up_EHD: Tensor
    down_EDH: Tensor
    shared_gate_up_SD: Tensor
    shared_down_DS: Tensor
    top_k: int
    padding: int = 0
    away_D: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E, without the padding."""
        return len(self.router_ED)


def flat_layer(layer: ExpertGraphMLP) -> FlatLayer:
    """Plain mixture of the shared and the routed experts of a layer.

    Its output is that of the graph layer where no property applies that ``models.export.lost`` names. Attached experts
    and the default output are left out.
    """
    routed = torch.tensor(
        [expert for expert in range(layer.num_shared, layer.num_experts) if expert not in layer.attached],
        dtype=torch.long,
    )
    shared_gate_SD, shared_up_SD = layer.gate_up_proj[: layer.num_shared].detach().chunk(2, dim=1)
    shared_down_SD = layer.down_proj[: layer.num_shared].detach().transpose(1, 2).flatten(0, 1)
    return FlatLayer(
        router_ED=layer.router.weight.detach()[routed],
        gate_up_EHD=layer.gate_up_proj.detach()[routed],
        down_EDH=layer.down_proj.detach()[routed],
        shared_gate_up_SD=torch.cat([shared_gate_SD.flatten(0, 1), shared_up_SD.flatten(0, 1)]),
        shared_down_DS=shared_down_SD.T,
        top_k=min(layer.num_visits - layer.num_shared, len(routed)),
    )


def check_flat(layers: Sequence[FlatLayer]) -> None:
    """Check that one number of routed experts and one of visits hold for every layer.

    Raises:
        UserError: they differ, or a layer has no routed expert that a token visits.
    """
    visits, counts = [layer.top_k for layer in layers], [layer.num_experts for layer in layers]
    if min(visits) < 1:
        raise UserError(
            "expected routed experts that a token visits in every layer, got none in layer "
            f"{visits.index(min(visits))}; raise the experts per token, or export a dense model"
        )
    if len(set(counts)) > 1 or len(set(visits)) > 1:
        raise UserError(
            "expected as many routed experts and visits in every layer, since the format holds one number of each, "
            f"got {_listed(counts)} experts and {_listed(visits)} visits; set `equalise` to pad them, or prune to one "
            "number"
        )


def equalized(layers: Sequence[FlatLayer], away: Sequence[Tensor]) -> list[FlatLayer]:
    """Pad layers with experts of zero weights to the largest number of routed experts and of visits.

    The padding is the last choice of every token whose router input has a positive product with ``-away``.

    Args:
        layers: layers of one model.
        away: per layer ``[D]``, router row of its padding at the scale of the export.

    Raises:
        UserError: a layer leaves out routed experts and has fewer visits than others.
    """
    most, visits = max(layer.num_experts for layer in layers), max(layer.top_k for layer in layers)
    for index, layer in enumerate(layers):
        if layer.top_k < min(visits, layer.num_experts):
            raise UserError(
                f"expected {visits} visits of routed experts in every layer, got {layer.top_k} of {layer.num_experts} "
                f"in layer {index}; bootstrap with as many shared experts in every layer"
            )
    return [
        replace(layer, padding=most - layer.num_experts, away_D=row)
        for layer, row in zip(layers, away, strict=True)
    ]


def with_copied_shared(layer: FlatLayer) -> FlatLayer:
    """Copy the shared neurons into every routed expert, divided by the visits: the same sum without shared neurons."""
    if not layer.shared_down_DS.shape[1]:
        return layer
    gate_EHD, up_EHD = layer.gate_up_EHD.chunk(2, dim=1)
    shared_gate_SD, shared_up_SD = layer.shared_gate_up_SD.chunk(2)
    count = layer.num_experts
    gate_up = torch.cat(
        [
            gate_EHD,
            shared_gate_SD.expand(count, -1, -1),
            up_EHD,
            shared_up_SD.expand(count, -1, -1),
        ],
        dim=1,
    )
    copies = (layer.shared_down_DS / layer.top_k).expand(count, -1, -1)
    return replace(
        layer,
        gate_up_EHD=gate_up,
        down_EDH=torch.cat([layer.down_EDH, copies], dim=2),
        shared_gate_up_SD=layer.shared_gate_up_SD[:0],
        shared_down_DS=layer.shared_down_DS[:, :0],
    )


def with_shared_width(layer: FlatLayer, width: int) -> FlatLayer:
    """Pad the shared neurons of a layer with zero neurons to ``width``."""
    missing = width - layer.shared_down_DS.shape[1]
    gate_SD, up_SD = (
        torch.nn.functional.pad(part, (0, 0, 0, missing)) for part in layer.shared_gate_up_SD.chunk(2)
    )
    return replace(
        layer,
        shared_gate_up_SD=torch.cat([gate_SD, up_SD]),
        shared_down_DS=torch.nn.functional.pad(layer.shared_down_DS, (0, missing)),
    )


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
