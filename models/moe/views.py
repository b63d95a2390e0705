"""Views of the layers of an opened model that have experts.

Layers are counted among those that have experts, from 0; each view also holds the index of its decoder layer.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.errors import UserError
from models.families.family import MoEFamily, RouterKind
from models.families.table import family_of, router_kind
from models.moe.fused_layer import FusedLayer
from models.moe.graph_layer import GraphLayer
from models.moe.layers import MoELayer
from models.moe.module_layer import ModuleLayer


def moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    """Views of the layers of a model that have experts, in order.

    Raises:
        UserError: none has, or a layer stores experts in an unknown way.
    """
    decoders = getattr(getattr(model, "model", None), "layers", None)
    if decoders is None:
        raise UserError(f"expected a decoder with model.layers, got {type(model).__name__}")
    family = family_of(model.config)
    found: list[MoELayer] = []
    for index, decoder in enumerate(decoders):
        block = _block(decoder, family)
        if block is not None:
            found.append(_layer(model.config, family, len(found), index, block))
    if not found:
        raise UserError(f"expected a model with experts, got {type(model).__name__}, whose layers have none")
    return found


def replace_block(model: PreTrainedModel, layer: MoELayer, block: nn.Module) -> None:
    """Put ``block`` in the place of the layer's block in the model; the view ``layer`` is stale afterwards."""
    decoder = model.model.layers[layer.decoder]
    name = next(name for name, child in decoder.named_children() if child is layer.block)
    setattr(decoder, name, block)


def _block(decoder: nn.Module, family: MoEFamily) -> nn.Module | None:
    """Module of a decoder layer that holds experts; None in a dense layer."""
    blocks = [getattr(decoder, name, None) for name in family.blocks]
    return next((block for block in blocks if block is not None and _has_experts(block, family)), None)


def _has_experts(block: nn.Module, family: MoEFamily) -> bool:
    return not family.experts or hasattr(block, family.experts)


def _layer(config: Any, family: MoEFamily, ordinal: int, index: int, block: nn.Module) -> MoELayer:
    kind = router_kind(config)
    router = next((getattr(block, name) for name in family.routers if hasattr(block, name)), None)
    if kind is RouterKind.GRAPH_WALK:
        return GraphLayer(ordinal, index, family, kind, block, cast(nn.Module, router), block)
    experts = getattr(block, family.experts)
    form = _form(experts, family)
    if not isinstance(getattr(router, "weight", None), Tensor) or form is None:
        raise UserError(
            f"expected a router with a weight, and experts as gate_up_proj [E, 2H, D] with down_proj [E, D, H] or as a "
            f"list of modules with gate, up and down projections; decoder layer {index} has {type(block).__name__}, "
            "whose layout is not supported"
        )
    return form(ordinal, index, family, kind, block, router, experts)


def _form(experts: Any, family: MoEFamily) -> type[MoELayer] | None:
    if ModuleLayer.can_view(experts, family):
        return ModuleLayer
    return FusedLayer if FusedLayer.can_view(experts) else None
