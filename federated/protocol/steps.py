"""Server step: the update of the global model from one version to the next, applied by server and clients alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from configs.errors import UserError
from experts.graph.edit_plan import AppliedPlan, apply_plan
from experts.graph.edits import AddEdge, Edit, MergeExperts, RemoveEdge, edits_from_dicts
from experts.graph.expert_graph import ExpertGraph
from federated.updates.update import RefusedUpdate, SparseUpdate
from federated.wire.codec import packed_stats, unpack_update
from federated.wire.packed_stats import PackedStats
from models.graph.graph_state import read_graph, write_graph
from models.graph.renumber import write_plan
from models.graph.unit_vectors import Unit, add_to_unit, unit_sizes
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

# Prefix of several parts; a packed update itself starts with a small integer of eight bytes.
_PARTS = b"fedgraft"


@dataclass(frozen=True)
class ServerStep:
    """Update of the global model from ``version - 1`` to ``version``.

    Attributes:
        version: number of server rounds that moved the model; 0: the bootstrapped checkpoint.
        packed: aggregated, quantized change of the experts, as ``federated.wire.codec`` packs it, in one part or
            several (see ``join_parts``).
        edits: plan of edits, made after the change is added (see ``experts.graph.edit_plan``).
    """

    version: int
    packed: bytes
    edits: list[Edit] = field(default_factory=list)

    def edits_json(self) -> str:
        """The edits as JSON."""
        return json.dumps([edit.as_dict() for edit in self.edits])

    def size(self) -> int:
        """Bytes of update and edits, without framing."""
        return len(self.packed) + len(self.edits_json())


def read_step(version: int, packed: bytes, edits_json: str) -> ServerStep:
    """Parse a received step.

    Raises:
        RefusedUpdate: edits that are not JSON, or JSON of another form.
    """
    try:
        return ServerStep(version, packed, edits_from_dicts(json.loads(edits_json)))
    except (ValueError, RecursionError) as error:
        raise RefusedUpdate(f"edits of step {version} cannot be read: {error}") from error


def apply_step(model: FedGraftForCausalLM, step: ServerStep) -> set[Unit]:
    """Add a step to ``model`` (fp32) and apply its edits; returns the units that moved, in numbers after the edits.

    Raises:
        RefusedUpdate: the step was made for another graph, its bytes are damaged, or an edit does not fit; the model
            is left as it was.
    """
    graph = read_graph(model)
    parts = split_parts(step.packed)
    sizes = unit_sizes(model, attention=True)

    def unpack(part: bytes) -> SparseUpdate:
        return unpack_update(part, sizes=sizes, graph_version=graph.version, graph_hash=graph.digest())

    # All parts are checked before any is applied; one part at a time is in memory.
    moved = _disjoint_units(unpack(part) for part in parts)
    plan = _applied(graph, step) if step.edits else None
    for part in parts:
        for unit, vector in unpack(part).vectors.items():
            add_to_unit(model, unit, torch.from_numpy(vector.to_dense()))
    # Residuals may hold gains of removed edges; an edge that is added again starts from zero.
    write_graph(model, graph)
    if plan is None:
        return moved
    moved |= {(edit.layer, edit.q) for edit in step.edits if isinstance(edit, AddEdge | RemoveEdge)}
    spawned = write_plan(model, plan)
    return set(plan.renumber(dict.fromkeys(moved))) | spawned


def join_parts(parts: Sequence[bytes]) -> bytes:
    """Concatenate packed updates, so that they are unpacked one at a time; a single one is unchanged."""
    if len(parts) == 1:
        return parts[0]
    return _PARTS + b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def split_parts(packed: bytes) -> list[bytes]:
    """Split the concatenation of ``join_parts``.

    Raises:
        RefusedUpdate: lengths that do not add up.
    """
    if not packed.startswith(_PARTS):
        return [packed]
    parts, start = [], len(_PARTS)
    while start < len(packed):
        end = start + 8 + int.from_bytes(packed[start : start + 8], "little")
        if end > len(packed) or end == start + 8:
            raise RefusedUpdate("expected whole parts of a step, got one that is cut short")
        parts.append(packed[start + 8 : end])
        start = end
    return parts


def _disjoint_units(updates: Iterable[SparseUpdate]) -> set[Unit]:
    seen: set[Unit] = set()
    for update in updates:
        if not seen.isdisjoint(update.vectors):
            raise RefusedUpdate(f"unit {min(seen.intersection(update.vectors))} is in two parts of a step")
        seen |= set(update.vectors)
    return seen


def step_stats(step: ServerStep) -> PackedStats:
    """Summed sizes of all parts of a step, without its edits."""
    parts = [packed_stats(part) for part in split_parts(step.packed)]
    raw = sum(part.raw_bytes for part in parts)
    return PackedStats(
        raw_bytes=raw,
        packed_bytes=len(step.packed),
        entropy_floor_bytes=sum(part.entropy_floor_bytes for part in parts),
        index_floor_bytes=sum(part.index_floor_bytes for part in parts),
        density=sum(part.density * part.raw_bytes for part in parts) / raw if raw else 0.0,
        index_bytes=sum(part.index_bytes for part in parts),
        value_bytes=sum(part.value_bytes for part in parts),
    )


def steps_after(steps: Iterable[ServerStep], version: int) -> list[ServerStep]:
    """Steps after ``version``, oldest first."""
    return sorted((step for step in steps if step.version > version), key=lambda step: step.version)


def check_plan(plan: Iterable[Edit]) -> None:
    """Refuse edits that cannot be sent: merged weights do not follow from the plan alone.

    Raises:
        UserError: names the edit.
    """
    for edit in plan:
        if isinstance(edit, MergeExperts):
            raise UserError(
                f"expected edits that follow from the graph alone, got {edit}; merge experts offline"
            )


def _applied(graph: ExpertGraph, step: ServerStep) -> AppliedPlan:
    try:
        check_plan(step.edits)
        return apply_plan(graph, step.edits)
    except UserError as error:
        raise RefusedUpdate(f"edits of step {step.version} do not fit: {error}") from error
