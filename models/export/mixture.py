"""Export of an expert graph as a mixture of experts of transformers.

A format weights the output of each visited expert by a softmax of router logits. Router rows times a small power of two
make these weights nearly equal without changing the choice of experts, and down projections times the number of experts
that share the softmax make them nearly one, as those of an untrained graph are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.choices import ExportFormat
from configs.errors import UserError
from models.export.constant_feature import constant_features
from models.export.flat_layer import (
    FlatLayer,
    check_flat,
    equalized,
    flat_layer,
    with_copied_shared,
    with_shared_width,
)
from models.export.mixture_format import FORMATS, MixtureFormat, Shape
from models.export.plain_model import plain_model, shared_settings
from models.moe.views import moe_layers
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

# Most growth of a routed expert by copies of the shared neurons, where the format has no shared expert.
MOST_GROWTH = 4
# Router logit, at the scale of the export, of experts that pad a layer: their share of a softmax is 2e-9.
_PADDING_LOGIT = -20.0


def mixture_layers(
    graph: FedGraftForCausalLM, to: ExportFormat, input_ids: Tensor, *, equalise: bool = False
) -> list[FlatLayer]:
    """Layers of a graph as plain mixtures that a format can hold.

    Args:
        graph: expert graph.
        to: format of a mixture of experts.
        input_ids: text ``[N, S]``, from which the router rows of padding are fitted.
        equalise: pad layers with fewer routed experts than others; otherwise they are refused.

    Raises:
        UserError: layers with different numbers of experts or visits, or without visited routed experts; shared experts
            whose copies would make the routed ones more than four times as wide.
    """
    layers = [flat_layer(layer) for layer in graph.expert_layers()]
    if equalise and len({(layer.num_experts, layer.top_k) for layer in layers}) > 1:
        layers = equalized(layers, [_PADDING_LOGIT * row for row in constant_features(graph, input_ids)])
    else:
        check_flat(layers)
    least = FORMATS[to].least_shared
    shared = max(layer.shared_down_DS.shape[1] for layer in layers)
    layers = [with_shared_width(layer, max(shared, least or 0)) for layer in layers]
    if least is not None:
        return layers
    neurons = layers[0].down_EDH.shape[2]
    if neurons + shared > MOST_GROWTH * neurons:
        raise UserError(
            f"expected a format with a shared expert for {shared} shared neurons a layer, got {to}, in which each "
            f"routed expert of {neurons} neurons would hold a copy; set `to` to {ExportFormat.QWEN2_MOE} or "
            f"{ExportFormat.GRANITE_MOE}"
        )
    return [with_copied_shared(layer) for layer in layers]


@torch.no_grad()
def mixture_model(
    graph: FedGraftForCausalLM, to: ExportFormat, layers: Sequence[FlatLayer], exponent: int
) -> PreTrainedModel:
    """Model of a format with the experts of ``layers`` and everything else of ``graph``, in the graph's dtype.

    Args:
        graph: expert graph.
        to: format of a mixture of experts.
        layers: of ``mixture_layers``.
        exponent: router rows are scaled by ``2 ** -exponent``.

    Raises:
        UserError: the graph has weights that the format lacks, e.g. biases.
    """
    form = FORMATS[to]
    shape = Shape(
        experts=max(layer.num_experts + layer.padding for layer in layers),
        visits=max(layer.top_k for layer in layers),
        neurons=layers[0].down_EDH.shape[2],
        shared=layers[0].shared_down_DS.shape[1],
    )
    config = form.config(**{**shared_settings(graph), **form.settings(graph, shape)})
    model = plain_model(graph, form.model, config)
    for view, decoder, layer in zip(moe_layers(model), model.model.layers, layers, strict=True):
        _write_experts(view.experts, layer, form)
        if form.write_shared is not None:
            form.write_shared(decoder, layer.shared_gate_up_SD, layer.shared_down_DS)
    scale_routers(model, layers, exponent)
    return model


@torch.no_grad()
def scale_routers(
    model: PreTrainedModel, layers: Sequence[FlatLayer], exponent: int, dtype: torch.dtype = torch.float32
) -> None:
    """Set the router rows of a model to those of ``layers`` times ``2 ** -exponent``, rounded to ``dtype``."""
    for view, layer in zip(moe_layers(model), layers, strict=True):
        rows_ED = layer.router_ED.float() * 2.0**-exponent
        if layer.padding and layer.away_D is not None:
            rows_ED = torch.cat([rows_ED, layer.away_D.expand(layer.padding, -1).to(rows_ED)])
        view.router_weight.copy_(rows_ED.to(dtype))


def _write_experts(experts: Any, layer: FlatLayer, form: MixtureFormat) -> None:
    pad = (0, 0, 0, 0, 0, layer.padding)
    experts.gate_up_proj.copy_(torch.nn.functional.pad(layer.gate_up_EHD, pad))
    experts.down_proj.copy_(torch.nn.functional.pad(layer.down_EDH * form.factor(layer), pad))
