"""What a client keeps on its own disk between messages: nothing stays in memory in a deployment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from clients.residual import ResidualStore
from configs.output import write_bytes
from experts.graph import ExpertGraph
from federated.blocks import Blocks
from models.assembler import Assembler
from models.checkpoint import read_graph, write_graph
from models.modeling_fedgraft import FedGraftForCausalLM
from models.units import Unit, read_unit, unit_sizes, write_unit


class ClientStore:
    """A folder of one client in one run; every file is replaced in one step.

    Args:
        folder: made on the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.residual = ResidualStore(self.folder / "residual.safetensors")
        self._global = self.folder / "global.safetensors"
        self._assembler = self.folder / "assembler.safetensors"
        self._blocks = self.folder / "blocks.safetensors"

    def load_global(self, model: FedGraftForCausalLM) -> int:
        """Bring a freshly loaded base ``model`` (fp32) to the version on disk, which is returned.

        Without a file that is whole and fits the model, the model stays as it is, at version 0.
        """
        saved = _read(self._global)
        if saved is None:
            return 0
        try:
            units, graph, version = _parse_global(*saved)
        except (KeyError, ValueError):
            return 0
        sizes = unit_sizes(model)
        if graph.num_experts != read_graph(model).num_experts or any(
            sizes.get(unit) != vector.numel() for unit, vector in units.items()
        ):
            return 0
        for unit, vector in units.items():
            write_unit(model, unit, vector)
        write_graph(model, graph)
        return version

    def forget_global(self) -> None:
        """Drop the copy on disk: the next load starts from the base."""
        self._global.unlink(missing_ok=True)

    def save_global(self, model: FedGraftForCausalLM, moved: set[Unit], version: int) -> None:
        """Keep the graph and the fp32 experts that ever moved: ``moved`` and those on disk already."""
        saved = _read(self._global)
        known = {_unit(name) for name in (saved[0] if saved else {}) if name.startswith("unit/")}
        units = (moved | known) & unit_sizes(model).keys()
        graph = read_graph(model)
        tensors = {f"unit/{layer}.{expert}": read_unit(model, (layer, expert)) for layer, expert in units}
        tensors |= {
            f"mask/{index}": torch.from_numpy(mask.astype(np.uint8)) for index, mask in enumerate(graph.masks)
        }
        _write(self._global, tensors, {"version": str(version), "graph_version": str(graph.version)})

    def load_assembler(self, seed: int) -> Assembler:
        """The client's own assembler; a fresh one from ``seed`` where there is none yet."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            assembler = Assembler()
        saved = _read(self._assembler)
        if saved is not None:
            with suppress(RuntimeError):  # of another shape
                assembler.load_state_dict(saved[0])
        return assembler

    def save_assembler(self, assembler: Assembler) -> None:
        """Keep the assembler for the next round; it never leaves the client."""
        _write(self._assembler, assembler.state_dict(), {})

    def blocks(self, make: Callable[[], tuple[str, Blocks, Blocks]]) -> tuple[str, Blocks, Blocks]:
        """Name, training blocks and held-out blocks of the client, made once and read from disk afterwards."""
        saved = _read(self._blocks)
        if saved is None:
            name, train, valid = make()
            tensors = {"train": train.input_ids, "train_labels": train.labels}
            tensors |= {"valid": valid.input_ids, "valid_labels": valid.labels}
            _write(self._blocks, {key: t.int() for key, t in tensors.items()}, {"name": json.dumps(name)})
            return name, train, valid
        tensors, metadata = {key: value.long() for key, value in saved[0].items()}, saved[1]
        train = Blocks(tensors["train"], tensors["train_labels"])
        return json.loads(metadata["name"]), train, Blocks(tensors["valid"], tensors["valid_labels"])


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    whole = {name: value.contiguous() for name, value in tensors.items()}
    write_bytes(path, save(whole, metadata={**metadata, "checksum": _checksum(whole, metadata)}))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of a file; None where there is none that is whole."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (FileNotFoundError, SafetensorError):
        return None
    checksum = metadata.pop("checksum", "")
    return (tensors, metadata) if checksum == _checksum(tensors, metadata) else None


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Over everything in a file: safetensors itself does not notice a changed bit."""
    digest = hashlib.blake2b(json.dumps(sorted(metadata.items())).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy() if tensor.numel() else b"")
    return digest.hexdigest()


def _parse_global(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[Unit, Tensor], ExpertGraph, int]:
    """Experts, graph and version of a saved global model; KeyError or ValueError for other contents."""
    units = {_unit(name): value for name, value in tensors.items() if name.startswith("unit/")}
    masks = [tensors[f"mask/{index}"].numpy().astype(np.bool_) for index in range(len(tensors) - len(units))]
    return units, ExpertGraph(tuple(masks), int(metadata["graph_version"])), int(metadata["version"])


def _unit(name: str) -> Unit:
    layer, expert = name.removeprefix("unit/").split(".")
    return int(layer), int(expert)
