"""Plan of typed edits: one ordered list that server, clients and offline tools apply alike.

All numbers are those before the plan; spawned experts have the numbers E, E + 1, ... in the order of the plan. Edges,
roots and spawned experts are edited in order, then experts are removed, all at once, and the remaining ones renumbered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from configs.errors import UserError
from experts.graph.edge_edits import apply_edits
from experts.graph.edits import Edit, MergeExperts, RetireExpert, SpawnExpert
from experts.graph.expert_edits import apply_expert_edits, unchanged
from experts.graph.expert_graph import ExpertGraph

# Experts that one plan may spawn in a layer; the version of the graph stands above them in an expert's identity.
_IDS_PER_PLAN = 1 << 16

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class AppliedPlan:
    """Graph after a plan, and where its experts come from.

    Attributes:
        graph: graph of the next version.
        origins: per layer int64 ``[E']``, number of each expert before the plan; -1: spawned.
        parents: per layer, spawned expert -> its parent, in numbers after the plan.
    """

    graph: ExpertGraph
    origins: tuple[np.ndarray, ...]
    parents: tuple[dict[int, int], ...]

    def renumber(self, values: Mapping[tuple[int, int], Value]) -> dict[tuple[int, int], Value]:
        """Values by unit in numbers after the plan, see ``renumber_units``."""
        return renumber_units(values, dict(enumerate(self.origins)))


def renumber_units(
    values: Mapping[tuple[int, int], Value], origins: Mapping[int, Sequence[int] | np.ndarray]
) -> dict[tuple[int, int], Value]:
    """Values by unit ``(layer, expert)`` in new numbers; those of removed experts are left out.

    Units with a negative number, which are no experts, keep it.

    Args:
        values: by unit in old numbers.
        origins: old number of each expert, by layer; -1: a new expert. Other layers stay as they are.
    """
    numbers = {
        layer: {int(old): new for new, old in enumerate(origin) if old >= 0}
        for layer, origin in origins.items()
    }

    def number(layer: int, expert: int) -> int | None:
        return expert if expert < 0 or layer not in numbers else numbers[layer].get(expert)

    moved = (((layer, number(layer, expert)), value) for (layer, expert), value in values.items())
    return {(layer, expert): value for (layer, expert), value in moved if expert is not None}


def apply_plan(graph: ExpertGraph, edits: Sequence[Edit]) -> AppliedPlan:
    """Apply typed edits of edges, roots and experts; ``graph`` stays unchanged.

    Args:
        graph: graph before the plan.
        edits: edits of one plan, in order.

    Raises:
        UserError: as ``apply_edits`` and ``apply_expert_edits``; a spawned expert of another number than the next, or
            beside a shared, attached or unknown one.
    """
    removals = [edit for edit in edits if isinstance(edit, RetireExpert | MergeExperts)]
    spawns = [edit for edit in edits if isinstance(edit, SpawnExpert)]
    wired = apply_edits(
        graph, [edit for edit in edits if not isinstance(edit, RetireExpert | MergeExperts | SpawnExpert)]
    )
    grown = _spawn(wired, spawns)
    edited = apply_expert_edits(grown, removals) if removals else unchanged(grown)
    before = zip(edited.kept, graph.num_experts, strict=True)
    origins = tuple(np.where(kept < count, kept, -1) for kept, count in before)
    return AppliedPlan(
        replace(edited.graph, version=grown.version), origins, _parents(spawns, edited.numbers)
    )


def spawned_last(graph: ExpertGraph, layer: int, expert: int) -> bool:
    """Whether an expert was spawned by the latest plan."""
    return graph.version > 0 and graph.ids_per_layer[layer][expert] // _IDS_PER_PLAN == graph.version


def _spawn(graph: ExpertGraph, spawns: Sequence[SpawnExpert]) -> ExpertGraph:
    if not spawns:
        return graph
    masks, attached = list(graph.masks), [list(each) for each in graph.attached_per_layer]
    ids = [list(each) for each in graph.ids_per_layer]
    for edit in spawns:
        _check_spawn(edit, graph, masks)
        mask = np.pad(masks[edit.layer], (0, 1))
        mask[edit.parent, edit.expert] = True
        masks[edit.layer] = mask
        attached[edit.layer].append(edit.expert)
        added = edit.expert - graph.num_experts[edit.layer]
        ids[edit.layer].append(graph.version * _IDS_PER_PLAN + added)
    return replace(
        graph, masks=tuple(masks), attached=tuple(map(tuple, attached)), ids=tuple(map(tuple, ids))
    )


def _check_spawn(edit: SpawnExpert, graph: ExpertGraph, masks: Sequence[np.ndarray]) -> None:
    if edit.layer >= len(masks) or edit.parent >= graph.num_experts[edit.layer]:
        raise UserError(f"expected a known layer and a known parent, got {edit}")
    if edit.expert != len(masks[edit.layer]) or edit.expert >= _IDS_PER_PLAN:
        raise UserError(f"expected the next expert of its layer, {len(masks[edit.layer])}, got {edit}")
    shared = edit.parent < graph.shared_per_layer[edit.layer]
    if shared or edit.parent in graph.attached_per_layer[edit.layer]:
        raise UserError(f"expected a parent that the router chooses, got {edit}")


def _parents(
    spawns: Sequence[SpawnExpert], numbers: Sequence[Mapping[int, int]]
) -> tuple[dict[int, int], ...]:
    """Spawned expert -> parent in numbers after the plan."""
    found: list[dict[int, int]] = [{} for _ in numbers]
    for edit in spawns:
        number = numbers[edit.layer]
        if edit.expert not in number or edit.parent not in number:
            raise UserError(
                f"expected a plan to keep a spawned expert and its parent, got {edit} and their removal"
            )
        found[edit.layer][number[edit.expert]] = number[edit.parent]
    return tuple(found)
