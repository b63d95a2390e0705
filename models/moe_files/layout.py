"""Layout of a stored mixture of experts: tensors, rows and configuration keys of its experts.

Shape suffixes: E experts of a layer, D hidden width, H neurons per expert.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from models.families.family import MoEFamily
from models.families.table import FAMILIES
from models.files.safetensors_files import StoredTensor, checkpoint_files, stored_tensors
from models.files.tensor_stream import count_parameters

_OF_EXPERT = re.compile(r"experts\.\d+\..+")


@dataclass(frozen=True)
class LayerLayout:
    """Tensors of one MoE layer, by full name.

    Attributes:
        ordinal: index among the layers with experts.
        decoder_layer: index among all decoder layers.
        num_experts: E.
        num_shared: shared experts, the first of the layer, which every token visits.
        own: per expert, its own tensors gate, up, down; empty where the weights are fused.
        fused: weights of all experts, ``[E, ...]``: gate and up, then down; empty where each has its own.
        rows: other tensors with one row an expert, the router first.
        pairs: tensors ``[E, E]``.
    """

    ordinal: int
    decoder_layer: int
    num_experts: int
    num_shared: int
    own: dict[int, tuple[str, ...]]
    fused: tuple[str, ...]
    rows: tuple[str, ...]
    pairs: tuple[str, ...]


@dataclass(frozen=True)
class MoELayout:
    """Checkpoint and its MoE layers.

    Attributes:
        source: its folder.
        config: values of ``config.json``.
        family: names of its tensors.
        tensors: all stored tensors by name, in the order of the files.
        layers: layers with experts, in order.
        beyond: tensors of layers behind the last (see ``MoEFamily.next_token_layers``).
    """

    source: Path
    config: dict[str, Any]
    family: MoEFamily
    tensors: dict[str, StoredTensor]
    layers: tuple[LayerLayout, ...]
    beyond: tuple[str, ...]

    @property
    def model_type(self) -> str:
        """Model type of the configuration."""
        return self.config["model_type"]

    @property
    def parameters(self) -> int:
        """Number of entries of all floating-point tensors."""
        return count_parameters(list(self.tensors.values()))

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files in bytes."""
        return sum(path.stat().st_size for path in {tensor.path for tensor in self.tensors.values()})

    @property
    def experts_per_layer(self) -> list[int]:
        """E of each MoE layer."""
        return [layer.num_experts for layer in self.layers]

    @property
    def shared_per_layer(self) -> list[int]:
        """Shared experts of each MoE layer."""
        return [layer.num_shared for layer in self.layers]

    @property
    def decoder_layers(self) -> list[int]:
        """Decoder index of each MoE layer."""
        return [layer.decoder_layer for layer in self.layers]


def read_moe_layout(source: Path) -> MoELayout:
    """Read the layout of a checkpoint folder from its configuration and the headers of its weight files.

    Raises:
        UserError: not a mixture of experts of a supported family, quantized weights, tensors that the family does not
            have, experts missing, or other counts than the configuration gives.
    """
    config = _read_config_values(source)
    family, shared = FAMILIES[config["model_type"]], _shared_counts(config)
    stored = [
        tensor
        for path in checkpoint_files(str(source))
        for tensor in sorted(stored_tensors(path), key=lambda each: each.start)
    ]
    tensors = {tensor.name: tensor for tensor in stored}
    by_layer, beyond = _sort_by_layer(tensors, family, config)
    layers: list[LayerLayout] = []
    for decoder_layer in sorted(by_layer):
        layer = _layer_layout(
            by_layer[decoder_layer], tensors, family, len(layers), decoder_layer, shared[decoder_layer]
        )
        if layer is not None:
            layers.append(layer)
    layout = MoELayout(source, config, family, tensors, tuple(layers), beyond)
    _check_counts(layout)
    return layout


def _read_config_values(source: Path) -> dict[str, Any]:
    try:
        values = json.loads((source / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"expected a checkpoint folder with config.json, got {source}: {error}") from error
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type not in FAMILIES:
        raise UserError(
            f"expected a mixture of experts of type {', '.join(FAMILIES)}, got {model_type!r} in {source}"
        )
    if values.get("quantization_config"):
        raise UserError(
            f"expected weights that are not quantized, got quantization_config in {source}/config.json; "
            "take the checkpoint in bf16 or fp32 and quantize the result"
        )
    return values


def _shared_counts(config: Mapping[str, Any]) -> list[int]:
    """Shared experts of each decoder layer by the configuration."""
    depth = config.get("num_hidden_layers")
    if not isinstance(depth, int):
        raise UserError(f"expected num_hidden_layers in config.json, got {depth!r}")
    key = FAMILIES[config["model_type"]].shared_key
    counts = (config.get(key) if key else None) or [0] * depth
    if (
        not isinstance(counts, list)
        or len(counts) != depth
        or any(type(n) is not int or n < 0 for n in counts)
    ):
        raise UserError(
            f"expected {key} of config.json to be one number for each of {depth} layers, got {counts}"
        )
    return counts


def _sort_by_layer(
    tensors: Mapping[str, StoredTensor], family: MoEFamily, config: Mapping[str, Any]
) -> tuple[dict[int, dict[str, str]], tuple[str, ...]]:
    """FFN tensors of each decoder layer (name within the block -> full name), and tensors of further layers."""
    in_layer = re.compile(rf"(?:model\.)?layers\.(\d+)\.(?:({'|'.join(family.blocks)})\.(.+)|.+)")
    depth = config["num_hidden_layers"]
    by_layer: dict[int, dict[str, str]] = {}
    beyond = []
    for name in tensors:
        match = in_layer.fullmatch(name)
        if match and int(match[1]) >= depth:
            beyond.append(name)
        elif match and match[2]:
            by_layer.setdefault(int(match[1]), {})[match[3]] = name
        elif ".experts." in name:
            raise UserError(f"expected experts in {' or '.join(family.blocks)} of a layer, got {name}")
    if beyond and not family.next_token_layers:
        raise UserError(f"expected {depth} layers as config.json says, got {beyond[0]}")
    return by_layer, tuple(beyond)


def _layer_layout(
    block: Mapping[str, str],
    tensors: Mapping[str, StoredTensor],
    family: MoEFamily,
    ordinal: int,
    decoder_layer: int,
    num_shared: int,
) -> LayerLayout | None:
    """Layout of a block; None for a dense one."""
    left = dict(block)
    fused, rows, pairs = (_take(left, patterns) for patterns in (family.fused, family.rows, family.pairs))
    single: dict[int, dict[str, str]] = {}
    for inner in [inner for inner in left if _OF_EXPERT.fullmatch(inner)]:
        expert, part = inner.split(".", 2)[1:]
        single.setdefault(int(expert), {})[part] = left.pop(inner)
    own = {expert: _take(single[expert], family.own) for expert in sorted(single)}
    left |= {name: name for parts in single.values() for name in parts.values()}
    if unknown := [name for inner, name in left.items() if not re.fullmatch(family.others, inner)]:
        raise UserError(f"expected tensors that a layer of this model type has, got {unknown[0]}")
    if not (own or fused or rows or pairs):
        return None
    whole = len(rows) == len(family.rows) and len(pairs) == len(family.pairs)
    whole &= not own if len(fused) == len(family.fused) else bool(own) and not fused
    if not whole or any(len(names) != len(family.own) for names in own.values()):
        raise UserError(
            f"expected a router and all weights of its experts in decoder layer {decoder_layer}, "
            "got only some of them; the checkpoint is incomplete"
        )
    count = tensors[rows[0]].shape[0]
    if num_shared > count:
        raise UserError(
            f"expected at most {count} shared experts in decoder layer {decoder_layer}, got {num_shared}"
        )
    layer = LayerLayout(ordinal, decoder_layer, count, num_shared, own, fused, rows, pairs)
    _check_shapes(layer, tensors)
    return layer


def _take(block: dict[str, str], patterns: Sequence[str]) -> tuple[str, ...]:
    """Pop the tensors that match from ``block``; return their full names in the order of ``patterns``."""
    found = [inner for pattern in patterns for inner in block if re.fullmatch(pattern, inner)]
    return tuple(block.pop(inner) for inner in found)


def _check_shapes(layer: LayerLayout, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a layer whose tensors do not agree on E."""
    count = layer.num_experts
    for name in (*layer.fused, *layer.rows, *layer.pairs):
        shape = tensors[name].shape
        wanted = [count, count] if name in layer.pairs else [count]
        if shape[: len(wanted)] != wanted:
            raise UserError(f"expected {count} experts in {name}, got shape {shape}")
    if layer.own and list(layer.own) != list(range(count)):
        raise UserError(
            f"expected experts 0 to {count - 1} in decoder layer {layer.decoder_layer}, as its router has, "
            f"got {len(layer.own)} experts; the checkpoint is incomplete"
        )


def _check_counts(layout: MoELayout) -> None:
    """Refuse a checkpoint without experts, or with other counts in its configuration than in its tensors."""
    if not layout.layers:
        raise UserError(f"expected a mixture of experts, got no layer with experts in {layout.source}")
    found = layout.experts_per_layer
    for key in layout.family.count_keys:
        said = layout.config.get(key)
        if said is not None and not (layout.family.holds(found) and said == layout.family.count_value(found)):
            raise UserError(
                f"expected {key} of config.json to be the experts in the weights, {found}, got {said}"
            )
