"""Lossless difference between the global model and the bootstrapped checkpoint, as one container (a snapshot).

For clients that are too far behind, or whose copy differs. Each unit that ever moved is a column: the entropy-coded
integer difference of the fp32 bit patterns, zero where nothing moved and small where little did.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from configs.errors import UserError
from configs.keys import Whole
from experts.graph.expert_graph import ExpertGraph, check_reachable
from federated.protocol.copy_hash import moved_vector, routing_vector
from federated.updates.update import RefusedUpdate
from federated.wire.byte_columns import ColumnsHeader, read_columns, write_columns
from federated.wire.columns import pack_column, unpack_column
from models.graph.attention_vectors import write_attention
from models.graph.graph_state import read_graph, write_graph
from models.graph.renumber import id_origins, identity_origins, renumber_experts
from models.graph.unit_vectors import OTHERS, Unit, unflatten_weights
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

_UNIT = re.compile(r"unit\.(\d{1,9})\.(-1|\d{1,9})")
_WIDTH = 32  # bits of a difference
_MOST_ADDED = 4096  # experts of a layer that the checkpoint lacks


class SnapshotHeader(ColumnsHeader):
    """Header of a snapshot: the version of the global model and of its graph.

    Attributes:
        ids: identities of the experts per layer; empty: those of the checkpoint.
        attached: attached experts per layer; empty: none.
    """

    format: Literal[1] = 1
    version: int = Field(ge=0)
    graph_version: int = Field(ge=0)
    ids: list[list[Whole]] = []
    attached: list[list[Whole]] = []
    checksum: str = ""


def pack_snapshot(
    model: FedGraftForCausalLM, base: FedGraftForCausalLM, moved: Iterable[Unit], version: int
) -> bytes:
    """Pack the difference of ``model`` at ``version`` from ``base``; equal states give equal bytes.

    One unit at a time is in memory in addition to the packed columns.

    Args:
        model: global model.
        base: bootstrapped checkpoint, just opened; it is brought to the experts of ``model``.
        moved: units that differ.
        version: version of ``model``.
    """
    graph = read_graph(model)
    columns = {f"mask.{index}": np.packbits(mask).tobytes() for index, mask in enumerate(graph.masks)}
    own = read_graph(base)
    renumber_experts(base, identity_origins(own, graph))
    changed = graph.ids_per_layer != own.ids_per_layer
    for index, (layer, old) in enumerate(zip(model.expert_layers(), base.expert_layers(), strict=True)):
        columns[f"routing.{index}"] = _pack_difference(routing_vector(layer), routing_vector(old))
    for unit in sorted(moved):
        columns[f"unit.{unit[0]}.{unit[1]}"] = _pack_difference(
            moved_vector(model, unit), moved_vector(base, unit)
        )
    header = SnapshotHeader(
        version=version,
        graph_version=graph.version,
        ids=[list(each) for each in graph.ids_per_layer] if changed else [],
        attached=[list(each) for each in graph.attached],
    )
    return write_columns(header, columns, _checksum)


def apply_snapshot(model: FedGraftForCausalLM, data: bytes, version: int) -> set[Unit]:
    """Add a packed difference to ``model``, just opened from the checkpoint; returns the units that differ from it.

    Every size is known from ``model`` before memory is allocated, and one unit at a time is in memory.

    Raises:
        RefusedUpdate: damaged bytes, another version or another graph; the contents of ``model`` are then undefined.
    """
    header, columns = read_columns(
        data, SnapshotHeader, _checksum, kind="a snapshot", contents="byte columns"
    )
    if header.version != version:
        raise RefusedUpdate(f"expected a snapshot of version {version}, got one of version {header.version}")
    _renumber(model, header)
    units = _known_units(model, columns)
    graph = _read_masks(model, columns, header)
    for unit in sorted(units):
        before = moved_vector(model, unit)
        _write(model, unit, _add_difference(before, columns[f"unit.{unit[0]}.{unit[1]}"], str(unit)))
    routing = [
        _add_difference(routing_vector(layer), columns[f"routing.{index}"], f"routing {index}")
        for index, layer in enumerate(model.expert_layers())
    ]
    write_graph(model, graph)  # clears gains of edges that are gone, so routing comes after it
    for layer, vector in zip(model.expert_layers(), routing, strict=True):
        _write_routing(layer, vector)
    return units


def _pack_difference(new: Tensor, old: Tensor) -> bytes:
    difference = new.numpy().view(np.int32) - old.numpy().view(np.int32)  # wraps around, both ways alike
    # Small differences of either sign become small unsigned numbers.
    return pack_column(((difference << 1) ^ (difference >> 31)).view(np.uint32), width=_WIDTH)


def _add_difference(old: Tensor, column: bytes, what: str) -> Tensor:
    coded = unpack_column(column, dtype=np.dtype(np.uint32), count=old.numel(), width=_WIDTH)
    difference = (coded >> 1).view(np.int32) ^ -(coded & 1).view(np.int32)
    new = torch.from_numpy((old.numpy().view(np.int32) + difference).view(np.float32))
    if not torch.isfinite(new).all():
        raise RefusedUpdate(f"expected finite values of {what} in a snapshot, got a NaN or an infinity")
    return new


def _write(model: FedGraftForCausalLM, unit: Unit, vector: Tensor) -> None:
    if unit[1] == OTHERS:
        write_attention(model, unit[0], vector)
    else:
        layer = model.expert_layer(unit[0])
        layer.write_expert(unit[1], *unflatten_weights(vector, layer.hidden_size))


@torch.no_grad()
def _write_routing(layer: ExpertGraphMLP, vector: Tensor) -> None:
    targets = list(layer.routing_parameters().values())
    for target, part in zip(targets, vector.split([target.numel() for target in targets]), strict=True):
        target.copy_(part.view_as(target))


def _known_units(model: FedGraftForCausalLM, columns: Mapping[str, bytes]) -> set[Unit]:
    """Units among the columns; checks that masks and routing are complete and that no column is unknown."""
    layers = model.expert_layers()
    rest = {f"{name}.{index}" for index in range(len(layers)) for name in ("mask", "routing")}
    units = set()
    for name in set(columns) - rest:
        match = _UNIT.fullmatch(name)
        layer, expert = (int(match[1]), int(match[2])) if match else (-1, -1)
        if not 0 <= layer < len(layers) or not OTHERS <= expert < layers[layer].num_experts:
            raise RefusedUpdate(f"unknown part {name[:40]!r} of a snapshot")
        units.add((layer, expert))
    if missing := rest - set(columns):
        raise RefusedUpdate(f"expected {min(missing)} in a snapshot, got none")
    return units


def _renumber(model: FedGraftForCausalLM, header: SnapshotHeader) -> None:
    """Bring the checkpoint to the experts of the snapshot; new ones are zeros, to which the difference is added."""
    if not header.ids:
        return
    own = read_graph(model)
    if len(header.ids) != len(own.masks) or any(
        not ids or len(set(ids)) != len(ids) or len(ids) > count + _MOST_ADDED
        for ids, count in zip(header.ids, own.num_experts, strict=True)
    ):
        raise RefusedUpdate("expected the identities of the experts of every layer in a snapshot")
    renumber_experts(model, id_origins(own.ids_per_layer, header.ids))


def _read_masks(
    model: FedGraftForCausalLM, columns: Mapping[str, bytes], header: SnapshotHeader
) -> ExpertGraph:
    masks = []
    for index, layer in enumerate(model.expert_layers()):
        experts, column = layer.num_experts, columns[f"mask.{index}"]
        if len(column) != -(-(experts**2) // 8):
            raise RefusedUpdate(f"expected a mask of {experts} experts in layer {index}")
        bits = np.unpackbits(np.frombuffer(column, dtype=np.uint8), count=experts**2)
        masks.append(bits.reshape(experts, experts).astype(np.bool_))
    try:
        graph = ExpertGraph(
            tuple(masks),
            header.graph_version,
            attached=tuple(map(tuple, header.attached)),
            ids=tuple(map(tuple, header.ids)),
        )
        for index, mask in enumerate(masks):
            check_reachable(mask, index)
    except UserError as error:
        raise RefusedUpdate(f"graph of a snapshot: {error}") from error
    return graph


def _checksum(header: SnapshotHeader, columns: Mapping[str, bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(header.unsigned())
    for name in sorted(columns):
        digest.update(f"\n{name} {len(columns[name])}\n".encode())
        digest.update(columns[name])
    return digest.hexdigest()
