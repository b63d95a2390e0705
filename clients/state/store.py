"""Files of one client in one run; in a deployment nothing stays in memory between messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from clients.residents.assembler import Assembler
from clients.state.global_copy import GlobalCopy
from clients.state.residual import Kept, ResidualStore, ShippedUpdate
from clients.state.round_files import RoundFiles
from experts.graph.expert_graph import ExpertGraph
from federated.data.blocks import Blocks
from models.files.checked_file import read_checked, write_checked
from models.graph.renumber import id_origins
from models.graph.unit_vectors import Unit


class ClientStore:
    """Folder of one client in one run; every file is replaced atomically.

    Args:
        folder: path, created on the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.copy = GlobalCopy(self.folder)
        self._residuals = RoundFiles(self.folder, "residual")
        self._assemblers = RoundFiles(self.folder, "assembler")
        self._blocks = self.folder / "blocks.safetensors"

    def load_residual(self, server_round: int) -> Kept:
        """Residual and last update before ``server_round``."""
        return ResidualStore(self._residuals.before(server_round)).load()

    def save_residual(
        self, server_round: int, residual: Mapping[Unit, Tensor], graph: ExpertGraph, shipped: ShippedUpdate
    ) -> None:
        """Save the residual after ``server_round``; arguments as in ``ResidualStore.save``."""
        ResidualStore(self._residuals.after(server_round)).save(residual, graph, shipped)
        self._residuals.prune(server_round)

    def load_assembler(self, seed: int, graph: ExpertGraph, server_round: int) -> Assembler:
        """The client's own assembler before a round, for the experts of ``graph``; without a file a new one.

        An expert's own logit is found by its identity where edits renumbered it; that of an added expert is zero.

        Args:
            seed: seed of the initial weights.
            graph: current graph.
            server_round: round in which the assembler is used.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            assembler = Assembler(graph.num_experts)
        saved = read_checked(self._assemblers.before(server_round))
        if saved is not None:
            # Checked first: ``load_state_dict`` loads the parameters that fit before it raises.
            with suppress(KeyError, ValueError, IndexError):
                state = _for_graph(*saved, graph)
                if _shapes(state) == _shapes(assembler.state_dict()):
                    assembler.load_state_dict(state)
        return assembler

    def save_assembler(self, assembler: Assembler, graph: ExpertGraph, server_round: int) -> None:
        """Save the assembler of the experts of ``graph`` after a round; it is never sent."""
        metadata = {"ids": json.dumps(graph.ids_per_layer)}
        write_checked(self._assemblers.after(server_round), assembler.state_dict(), metadata)
        self._assemblers.prune(server_round)

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


def _for_graph(
    state: Mapping[str, Tensor], metadata: Mapping[str, str], graph: ExpertGraph
) -> dict[str, Tensor]:
    """Parameters of an assembler with the own logits in the order of the experts of ``graph``."""
    origins = id_origins(json.loads(metadata["ids"]), graph.ids_per_layer)
    return dict(state) | {
        f"own.{layer}": _remap_logits(state[f"own.{layer}"], torch.from_numpy(origin))
        for layer, origin in enumerate(origins)
    }


def _remap_logits(logits: Tensor, origin: Tensor) -> Tensor:
    """Logits ``[E']`` by present number, from those ``[E]`` by former number ``origin [E']``; 0 where it is -1."""
    return torch.where(origin >= 0, logits[origin.clamp(min=0)], 0.0)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}
