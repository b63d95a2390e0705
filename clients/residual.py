"""The residual on a client's disk: the changes it has not shipped yet, tied to a graph version."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from configs.output import write_bytes
from federated.update import Unit

_log = logging.getLogger(__name__)


class ResidualStore:
    """One safetensors file with a float32 vector [size] for each unit.

    A save replaces the whole file at once: a client killed half-way keeps the residual of the round before.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)

    def load(self, graph_version: int, *, sizes: Mapping[Unit, int] | None = None) -> dict[Unit, Tensor]:
        """Return the residual, empty when there is none.

        ``sizes``: entries of every unit of the present graph; units that are gone or have another size
        are dropped. Saved under another graph version and without ``sizes``, all of it is dropped. A
        file that cannot be read is set aside as ``*.broken`` with a warning and counts as empty.
        """
        if not self._path.exists():
            return {}
        try:
            saved_version, vectors = self._read()
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            self._set_aside(error)
            return {}
        if sizes is None:
            return vectors if saved_version == graph_version else {}
        return {unit: vector for unit, vector in vectors.items() if sizes.get(unit) == vector.numel()}

    def save(self, vectors: Mapping[Unit, Tensor], graph_version: int) -> None:
        """Replace the stored residual by ``vectors`` (float [size] per unit)."""
        tensors = {
            f"{layer}.{expert}": vector.detach().float().cpu().contiguous().clone()
            for (layer, expert), vector in vectors.items()
        }
        write_bytes(self._path, save(tensors, metadata={"graph_version": str(graph_version)}))

    def _read(self) -> tuple[int, dict[Unit, Tensor]]:
        with safe_open(self._path, framework="pt") as file:
            version = int((file.metadata() or {})["graph_version"])
            vectors = {_unit(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for unit, vector in vectors.items():
            if vector.ndim != 1 or not torch.isfinite(vector).all():
                raise ValueError(f"unit {unit} is not a finite vector")
        return version, vectors

    def _set_aside(self, error: Exception) -> None:
        broken = self._path.with_name(self._path.name + ".broken")
        os.replace(self._path, broken)
        _log.warning("residual %s cannot be read (%s): kept as %s, starting empty", self._path, error, broken)


def _unit(name: str) -> Unit:
    layer, expert = name.split(".")
    return int(layer), int(expert)
