"""The global model on the server: fp32 experts, the graph, and the packed steps that clients replay."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from configs.output import new_directory
from experts.graph.edit_plan import AppliedPlan, apply_plan
from experts.graph.edits import Edit
from experts.graph.expert_graph import ExpertGraph
from federated.protocol.copy_hash import copy_hash, unit_digest
from federated.protocol.snapshot import pack_snapshot
from federated.protocol.steps import ServerStep, apply_step, check_plan, steps_after
from federated.updates.remap import remap_vectors
from models.bootstrap.recipe import graph_fingerprint, read_recipe_file
from models.checkpoints.disk_experts import open_mapped
from models.checkpoints.load import load_graph, load_tokenizer
from models.checkpoints.save import cast_weights, save_checkpoint
from models.files.config_file import read_dtype
from models.graph.graph_state import read_graph
from models.graph.renumber import restore_layers, saved_layers, write_plan
from models.graph.unit_vectors import Unit, unit_sizes, weight_count
from server.model.pack_step import pack_step

# Minimum backlog of missing steps before a snapshot, which takes time, is packed and compared by size.
SNAPSHOT_FROM = 4


class GlobalModel:
    """The model that all clients share, changed by packed steps only.

    A step is packed first and applied as packed, so that a client that replays it holds the same experts bit for bit;
    quantization errors and entries left out accumulate in the server's residual (error feedback).

    Args:
        source: checkpoint folder of the bootstrapped graph.

    Attributes:
        version: steps since the bootstrapped checkpoint.
        steps: the last steps, for clients that lack them.
        residual: error feedback ``[size]`` of each unit that moved.

    Raises:
        UserError: there is no such graph.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.model = load_graph(source, dtype=torch.float32)
        self.tokenizer = load_tokenizer(source)
        self.fingerprint = graph_fingerprint(source)
        self.version = 0
        self.steps: list[ServerStep] = []
        self._dtype = read_dtype(source)
        self.residual: dict[Unit, Tensor] = {}
        self._digests: dict[Unit, str] = {}
        self._copy_hash: str | None = None
        self._snapshot: bytes | None = None

    @property
    def graph(self) -> ExpertGraph:
        """The current expert graph."""
        return read_graph(self.model)

    def recipe(self) -> bytes:
        """Return the recipe of the bootstrapped graph from its dense base; empty where the checkpoint has none."""
        return read_recipe_file(self.source)

    def advance(self, change: Mapping[Unit, Tensor], *, value_bits: int, density: float = 1.0) -> None:
        """Pack and apply the next step; an empty change gives a step without entries.

        Args:
            change: aggregated change ``[size]`` per unit that clients shipped; other units do not change.
            value_bits: bits per value of the step.
            density: kept entries / all entries of each unit; 1: every entry that a client shipped.

        Raises:
            UserError: the change is not finite or too large to be sent; the model is left as it was.
        """
        graph = self.graph
        packed = pack_step(
            change,
            self.residual,
            density=density,
            value_bits=value_bits,
            graph_version=graph.version,
            graph_hash=graph.digest(),
        )
        self._append(ServerStep(self.version + 1, packed))

    def _append(self, step: ServerStep) -> None:
        """Apply a step without edits and record it."""
        moved = apply_step(self.model, step)
        self._digests |= {unit: unit_digest(self.model, unit) for unit in moved}
        self.steps.append(step)
        self.version = step.version
        self._copy_hash = self._snapshot = None

    def replay(self, steps: Iterable[ServerStep], residual: Mapping[Unit, Tensor], *, kept_from: int) -> None:
        """Bring the bootstrapped model to a saved version by its steps, bit for bit.

        Args:
            steps: all steps from version 1, with their edits.
            residual: server's residual after the last of them.
            kept_from: version after which steps are kept for clients that lack them.
        """
        for step in steps:
            self._append(ServerStep(step.version, step.packed))
            if step.edits:
                self.edit(step.edits)
        self.residual = dict(residual)
        self.drop_steps(kept_from)

    def edit(self, edits: Sequence[Edit]) -> AppliedPlan:
        """Apply a plan of graph edits and append it to the latest step.

        Raises:
            UserError: an edit that does not fit, or one that clients cannot replay; the model is left as it was.
        """
        check_plan(edits)
        counts, plan = self.graph.num_experts, apply_plan(self.graph, edits)
        spawned = write_plan(self.model, plan)
        self._digests = plan.renumber(self._digests)
        self._digests |= {unit: unit_digest(self.model, unit) for unit in spawned}
        self.residual = remap_vectors(self.residual, plan.origins, counts)
        latest = self.steps.pop()
        self.steps.append(ServerStep(latest.version, latest.packed, list(edits)))
        self._copy_hash = self._snapshot = None
        return plan

    @property
    def copy_hash(self) -> str:
        """Hash that a client's copy of this version must have."""
        if self._copy_hash is None:
            self._copy_hash = copy_hash(self.model, self._digests)
        return self._copy_hash

    def snapshot(self) -> bytes:
        """Return all differences from the bootstrapped checkpoint, packed; cached per version."""
        if self._snapshot is None:
            base = open_mapped(self.source)
            self._snapshot = pack_snapshot(self.model, base, self._digests, self.version)
        return self._snapshot

    def catch_up(self, held: int) -> tuple[list[ServerStep], bytes]:
        """Return the missing steps and an empty snapshot, or no step and a snapshot where that is smaller.

        Args:
            held: version that a client holds; 0: the checkpoint.
        """
        missing = steps_after(self.steps, held)
        whole = len(missing) == max(self.version - held, 0)
        if whole and len(missing) < SNAPSHOT_FROM:
            return missing, b""
        snapshot = self.snapshot()
        if whole and sum(step.size() for step in missing) <= len(snapshot):
            return missing, b""
        return [], snapshot

    def drop_steps(self, held: int) -> None:
        """Drop steps up to version ``held``, then the oldest ones beyond the fp32 bytes of all moved units.

        A client that still needs a dropped step receives a snapshot.

        Args:
            held: lowest version that a client holds.
        """
        self.steps = steps_after(self.steps, held)
        sizes = unit_sizes(self.model, attention=True)
        room = 4 * sum(sizes[unit] for unit in self._digests)
        while len(self.steps) > 1 and sum(step.size() for step in self.steps) > room:
            self.steps.pop(0)

    @contextmanager
    def trying(self, edits: Sequence[Edit]) -> Iterator[None]:
        """Apply graph edits for the duration of a ``with`` block."""
        before = saved_layers(self.model)
        try:
            write_plan(self.model, apply_plan(self.graph, edits))
            yield
        finally:
            restore_layers(self.model, before)

    def dense_bytes(self) -> int:
        """Return the bytes of all FFN weights in bf16: what dense FedAvg sends per client, direction and round."""
        return 2 * sum(weight_count(layer) * layer.num_experts for layer in self.model.expert_layers())

    def save(self, directory: Path, *, overwrite: bool, keep: bool = True) -> None:
        """Write the model as a checkpoint in the dtype of the bootstrapped one.

        Args:
            directory: of the checkpoint.
            overwrite: whether its content may be replaced.
            keep: whether the model is used afterwards; otherwise it is cast in place, without a second one in memory.
        """
        with new_directory(directory, overwrite=overwrite) as partial:
            model = copy.deepcopy(self.model) if keep else self.model
            save_checkpoint(cast_weights(model, self._dtype), self.tokenizer, partial)
