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
from experts.graph.expert_edits import apply_expert_edits
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

    def renumbered_layers(self, before: Sequence[int]) -> list[int]:
        """Layers whose experts are others than the ``before[layer]`` ones before the plan, or in other places."""
        return [
            layer
            for layer, (origin, count) in enumerate(zip(self.origins, before, strict=True))
            if not np.array_equal(origin, np.arange(count))
        ]

    def renumber(self, values: Mapping[tuple[int, int], Value]) -> dict[tuple[int, int], Value]:
        """Values by unit ``(layer, expert)`` in numbers after the plan; those of removed experts are left out.

        Units with a negative number, which are no experts, keep it.
        """
        numbers = [{int(old): new for new, old in enumerate(origin) if old >= 0} for origin in self.origins]
        return {
            (layer, expert if expert < 0 else numbers[layer][expert]): value
            for (layer, expert), value in values.items()
            if expert < 0 or expert in numbers[layer]
        }


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
    if not removals:
        origins = [_origin(count, mask) for count, mask in zip(graph.num_experts, grown.masks, strict=True)]
        return AppliedPlan(grown, tuple(origins), _parents(spawns, [{}] * len(origins)))
    edited = apply_expert_edits(grown, removals)
    before = zip(edited.kept, graph.num_experts, strict=True)
    origins = [np.where(kept < count, kept, -1) for kept, count in before]
    return AppliedPlan(
        replace(edited.graph, version=grown.version), tuple(origins), _parents(spawns, edited.numbers)
    )


def spawned_last(graph: ExpertGraph, layer: int, expert: int) -> bool:
    """Whether an expert was spawned by the latest plan."""
    return graph.version > 0 and graph.ids_per_layer[layer][expert] // _IDS_PER_PLAN == graph.version


def _origin(count: int, mask: np.ndarray) -> np.ndarray:
    numbers = np.arange(len(mask))
    return np.where(numbers < count, numbers, -1)


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
    """Spawned expert -> parent in numbers after the plan; an empty map of numbers changes none."""
    found: list[dict[int, int]] = [{} for _ in numbers]
    for edit in spawns:
        number = numbers[edit.layer] or {each: each for each in (edit.expert, edit.parent)}
        if edit.expert not in number or edit.parent not in number:
            raise UserError(
                f"expected a plan to keep a spawned expert and its parent, got {edit} and their removal"
            )
        found[edit.layer][number[edit.expert]] = number[edit.parent]
    return tuple(found)
