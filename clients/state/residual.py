"""What a client keeps of its own changes: those it has not shipped yet, and the update that it shipped last."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clients.state.checked_file import check_in_turn, read_tensor, write_in_turn
from federated.updates.lazy_vectors import LazyVectors
from federated.updates.update import parse_unit, unit_name
from models.graph.unit_vectors import Unit

_log = logging.getLogger(__name__)

_SHIPPED = "shipped"


@dataclass(frozen=True)
class ShippedUpdate:
    """The update that a client shipped last.

    Attributes:
        server_round: for which it was shipped.
        packed: as it was sent.
        sizes: entries of every unit in it.
    """

    server_round: int
    packed: bytes
    sizes: dict[Unit, int]


@dataclass(frozen=True)
class Kept:
    """What lies on a client's disk.

    Attributes:
        residual: float32 ``[size]`` of each unit, read from disk when it is asked for.
        sizes: entries of each of these units.
        shipped: the last update; None before the first.
        graph_version: on which both were computed; None where there is nothing.
    """

    residual: Mapping[Unit, Tensor] = field(default_factory=dict)
    sizes: dict[Unit, int] = field(default_factory=dict)
    shipped: ShippedUpdate | None = None
    graph_version: int | None = None


class ResidualStore:
    """One safetensors file with the residual of each unit and the packed update.

    A save replaces the whole file in one step, so that the two always belong together: a client killed at any point
    keeps both of the round before, or both of this one. One unit at a time is in memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)

    def load(self) -> Kept:
        """What was saved last.

        A file that is damaged is set aside as ``*.broken`` with a warning, and counts as none.
        """
        if not self._path.exists():
            return Kept()
        saved = check_in_turn(self._path)
        if saved is None:
            return self._set_aside()
        shapes, metadata = saved
        names = {parse_unit(name): name for name in shapes if name != _SHIPPED}
        residual = LazyVectors(names, lambda unit: read_tensor(self._path, names[unit]))
        sizes = {unit: shapes[name][0] for unit, name in names.items()}
        return Kept(residual, sizes, self._shipped(metadata), int(metadata["graph_version"]))

    def save(
        self, residual: Mapping[Unit, Tensor], graph_version: int, shipped: ShippedUpdate | None = None
    ) -> None:
        """Replace what was saved.

        Args:
            residual: float ``[size]`` per unit; may come from this store's file. Units of zeros are left out.
            graph_version: on which residual and update were computed.
            shipped: the update.
        """
        self._remove_partial()
        names = {unit_name(unit): unit for unit in residual}
        metadata = {"graph_version": str(graph_version)}
        packed: dict[str, bytes] = {}
        if shipped is not None:
            packed[_SHIPPED] = shipped.packed
            sizes = {unit_name(unit): size for unit, size in shipped.sizes.items()}
            metadata |= {"shipped_round": str(shipped.server_round), "shipped_sizes": json.dumps(sizes)}

        def read(name: str) -> Tensor:
            if name in packed:
                return torch.from_numpy(np.frombuffer(packed[name], dtype=np.uint8).copy())
            return residual[names[name]].detach().float().cpu()

        write_in_turn(self._path, [*names, *packed], read, metadata)

    def _shipped(self, metadata: Mapping[str, str]) -> ShippedUpdate | None:
        if "shipped_round" not in metadata:
            return None
        sizes = {parse_unit(name): size for name, size in json.loads(metadata["shipped_sizes"]).items()}
        packed = read_tensor(self._path, _SHIPPED).numpy().tobytes()
        return ShippedUpdate(int(metadata["shipped_round"]), packed, sizes)

    def _set_aside(self) -> Kept:
        broken = self._path.with_name(self._path.name + ".broken")
        os.replace(self._path, broken)
        _log.warning("residual %s is damaged: kept as %s, starting empty", self._path, broken)
        return Kept()

    def _remove_partial(self) -> None:
        """Remove what processes that were killed while saving left behind."""
        for path in self._path.parent.glob(f".{self._path.name}.*.partial"):
            path.unlink()
