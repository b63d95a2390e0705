"""Files of one client in one run; in a deployment nothing stays in memory between messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from clients.residents.assembler import Assembler
from clients.state.global_copy import GlobalCopy
from clients.state.residual import ResidualStore
from federated.data.blocks import Blocks
from models.files.checked_file import read_checked, write_checked


class ClientStore:
    """Folder of one client in one run; every file is replaced atomically.

    Args:
        folder: path, created on the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.residual = ResidualStore(self.folder / "residual.safetensors")
        self.copy = GlobalCopy(self.folder)
        self._assembler = self.folder / "assembler.safetensors"
        self._blocks = self.folder / "blocks.safetensors"

    def load_assembler(self, seed: int, num_experts: Sequence[int]) -> Assembler:
        """The client's own assembler; a new one from ``seed`` without a file for these numbers of experts."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            assembler = Assembler(num_experts)
        saved = read_checked(self._assembler)
        if saved is not None:
            with suppress(RuntimeError):  # of another shape
                assembler.load_state_dict(saved[0])
        return assembler

    def save_assembler(self, assembler: Assembler) -> None:
        """Save the assembler for the next round; it is never sent."""
        write_checked(self._assembler, assembler.state_dict(), {})

    def blocks(self, make: Callable[[], tuple[str, Blocks, Blocks]]) -> tuple[str, Blocks, Blocks]:
        """Name, training blocks and held-out blocks of the client, built once and read from disk afterwards."""
        saved = read_checked(self._blocks)
        if saved is None:
            name, train, valid = make()
            tensors = {"train": train.input_ids, "train_labels": train.labels}
            tensors |= {"valid": valid.input_ids, "valid_labels": valid.labels}
            write_checked(
                self._blocks, {key: t.int() for key, t in tensors.items()}, {"name": json.dumps(name)}
            )
            return name, train, valid
        tensors, metadata = {key: value.long() for key, value in saved[0].items()}, saved[1]
        train = Blocks(tensors["train"], tensors["train_labels"])
        return json.loads(metadata["name"]), train, Blocks(tensors["valid"], tensors["valid_labels"])
