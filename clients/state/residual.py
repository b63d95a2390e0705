"""File of a client's residual and of the update that it shipped last."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from experts.graph.expert_graph import ExpertGraph
from federated.updates.lazy_vectors import LazyVectors
from federated.updates.update import parse_unit, unit_name
from models.files.checked_file import bytes_tensor, check_in_turn, tensor_bytes, write_in_turn
from models.files.safetensors_files import StoredTensor, read_stored
from models.graph.unit_vectors import Unit

_log = logging.getLogger(__name__)

_SHIPPED = "shipped"


@dataclass(frozen=True)
class ShippedUpdate:
    """The update that a client shipped last.

    Attributes:
        server_round: round of the update.
        packed: packed update as sent.
        sizes: entries of each of its units.
    """

    server_round: int
    packed: bytes
    sizes: dict[Unit, int]


@dataclass(frozen=True)
class Kept:
    """Contents of the file.

    Attributes:
        residual: float32 ``[size]`` of each unit, read from disk on access.
        sizes: entries of each of these units.
        shipped: the last update; None before the first.
        graph_version: version of the graph of both; None without a file.
        ids: identities of the experts of each layer of that graph; empty without a file.
    """

    residual: Mapping[Unit, Tensor] = field(default_factory=dict)
    sizes: dict[Unit, int] = field(default_factory=dict)
    shipped: ShippedUpdate | None = None
    graph_version: int | None = None
    ids: tuple[tuple[int, ...], ...] = ()


class ResidualStore:
    """One safetensors file with the residual of each unit and the packed update.

    A save replaces the whole file atomically, so that residual and update always belong to the same round, even after
    a kill. One unit at a time is in memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)

    def load(self) -> Kept:
        """Read the file; a damaged one is renamed to ``*.broken`` with a warning and treated as absent."""
        if not self._path.exists():
            return Kept()
        saved = check_in_turn(self._path)
        if saved is None:
            return self._set_aside()
        stored, metadata = saved
        units = {parse_unit(name): tensor for name, tensor in stored.items() if name != _SHIPPED}
        residual = LazyVectors(units, lambda unit: read_stored(units[unit]))
        sizes = {unit: tensor.shape[0] for unit, tensor in units.items()}
        shipped = _shipped(stored, metadata)
        ids = tuple(map(tuple, json.loads(metadata.get("ids", "[]"))))
        return Kept(residual, sizes, shipped, int(metadata["graph_version"]), ids)

    def save(
        self, residual: Mapping[Unit, Tensor], graph: ExpertGraph, shipped: ShippedUpdate | None = None
    ) -> None:
        """Replace the file.

        Args:
            residual: float ``[size]`` per unit; may be read from this file. All-zero units are left out.
            graph: graph of residual and update.
            shipped: last update.
        """
        self._remove_partial()
        names = {unit_name(unit): unit for unit in residual}
        metadata = {"graph_version": str(graph.version), "ids": json.dumps(graph.ids_per_layer)}
        packed: dict[str, bytes] = {}
        if shipped is not None:
            packed[_SHIPPED] = shipped.packed
            sizes = {unit_name(unit): size for unit, size in shipped.sizes.items()}
            metadata |= {"shipped_round": str(shipped.server_round), "shipped_sizes": json.dumps(sizes)}

        def read(name: str) -> Tensor:
            if name in packed:
                return bytes_tensor(packed[name])
            return residual[names[name]].detach().float().cpu()

        write_in_turn(self._path, [*names, *packed], read, metadata)

    def _set_aside(self) -> Kept:
        broken = self._path.with_name(self._path.name + ".broken")
        os.replace(self._path, broken)
        _log.warning("residual %s is damaged: kept as %s, starting empty", self._path, broken)
        return Kept()

    def _remove_partial(self) -> None:
        """Remove partial files of killed processes."""
        for path in self._path.parent.glob(f".{self._path.name}.*.partial"):
            path.unlink()


def _shipped(stored: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> ShippedUpdate | None:
    if "shipped_round" not in metadata:
        return None
    sizes = {parse_unit(name): size for name, size in json.loads(metadata["shipped_sizes"]).items()}
    packed = tensor_bytes(read_stored(stored[_SHIPPED]))
    return ShippedUpdate(int(metadata["shipped_round"]), packed, sizes)
