"""What a client keeps on its own disk between messages: nothing stays in memory in a deployment."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from models.units import Unit, read_unit, write_unit


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
        """Bring a freshly loaded base ``model`` (fp32) to the version on disk, which is returned; 0 without one."""
        saved = _read(self._global)
        if saved is None:
            return 0
        tensors, metadata = saved
        masks = []
        for name, value in tensors.items():
            kind, _, index = name.partition("/")
            if kind == "mask":
                masks.append((int(index), value.numpy().astype(np.bool_)))
            else:
                layer, expert = index.split(".")
                write_unit(model, (int(layer), int(expert)), value)
        ordered = tuple(mask for _, mask in sorted(masks, key=lambda item: item[0]))
        write_graph(model, ExpertGraph(ordered, int(metadata["graph_version"])))
        return int(metadata["version"])

    def save_global(self, model: FedGraftForCausalLM, moved: set[Unit], version: int) -> None:
        """Keep the graph and the fp32 experts that ever moved: ``moved`` and those on disk already."""
        saved = _read(self._global)
        known = [name.partition("/")[2] for name in (saved[0] if saved else {}) if name.startswith("unit/")]
        units = moved | {(int(layer), int(expert)) for layer, expert in (name.split(".") for name in known)}
        graph = read_graph(model)
        tensors = {f"unit/{layer}.{expert}": read_unit(model, (layer, expert)) for layer, expert in units}
        tensors |= {
            f"mask/{index}": torch.from_numpy(mask.astype(np.uint8)) for index, mask in enumerate(graph.masks)
        }
        metadata = {"version": str(version), "graph_version": str(graph.version)}
        write_bytes(self._global, save(tensors, metadata=metadata))

    def load_assembler(self, seed: int) -> Assembler:
        """The client's own assembler; a fresh one from ``seed`` where there is none yet."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            assembler = Assembler()
        saved = _read(self._assembler)
        if saved is not None:
            assembler.load_state_dict(saved[0])
        return assembler

    def save_assembler(self, assembler: Assembler) -> None:
        """Keep the assembler for the next round; it never leaves the client."""
        write_bytes(
            self._assembler,
            save({name: value.contiguous() for name, value in assembler.state_dict().items()}),
        )

    def blocks(self, make: Callable[[], tuple[str, Blocks, Blocks]]) -> tuple[str, Blocks, Blocks]:
        """Name, training blocks and held-out blocks of the client, made once and read from disk afterwards."""
        saved = _read(self._blocks)
        if saved is None:
            name, train, valid = make()
            tensors = {"train": train.input_ids, "train_labels": train.labels}
            tensors |= {"valid": valid.input_ids, "valid_labels": valid.labels}
            metadata = {"name": json.dumps(name)}
            write_bytes(
                self._blocks,
                save({key: t.int().contiguous() for key, t in tensors.items()}, metadata=metadata),
            )
            return name, train, valid
        tensors, metadata = {key: value.long() for key, value in saved[0].items()}, saved[1]
        train = Blocks(tensors["train"], tensors["train_labels"])
        return json.loads(metadata["name"]), train, Blocks(tensors["valid"], tensors["valid_labels"])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of a file; None where there is none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (FileNotFoundError, SafetensorError):
        return None
