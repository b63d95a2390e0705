from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from configs.errors import UserError
from experts.graph.edits import AddEdge, MergeExperts, RemoveEdge
from experts.graph.expert_graph import ExpertGraph
from federated.protocol.steps import (
    ServerStep,
    apply_step,
    check_plan,
    join_parts,
    read_step,
    split_parts,
    step_stats,
    steps_after,
)
from federated.updates.update import RefusedUpdate
from federated.wire.codec import packed_stats
from models.graph.graph_state import read_graph, write_graph
from models.graph.unit_vectors import read_unit, unit_sizes
from tests.support.tiny_federation import all_equal, next_step, packed_change, random_change
from tests.support.tiny_graphs import graph_of, with_random_gains

EDITS = [RemoveEdge(0, 0, 1, "why"), AddEdge(1, 1, 3)]


@pytest.fixture
def model():
    """Edges 0 -> 1 -> 2 -> 3 in both layers."""
    graph = with_random_gains(graph_of())
    write_graph(graph, ExpertGraph((np.eye(4, dtype=bool) | np.eye(4, k=1, dtype=bool),) * 2, 5))
    return graph


def test_two_copies_that_apply_the_same_steps_are_equal_bit_for_bit(model):
    other = copy.deepcopy(model)
    for version in (1, 2, 3):
        step = next_step(model, version, edits=EDITS if version == 2 else [])
        crossed = read_step(step.version, bytes(step.packed), step.edits_json())
        assert crossed == step
        assert apply_step(model, step) == apply_step(other, crossed) == set(unit_sizes(model))
    assert all_equal(model, other)
    assert read_graph(model).version == 6


@pytest.mark.parametrize("value_bits", [2, 4, 8, 16])
def test_a_step_adds_what_was_packed_to_the_units_it_names(model, value_bits):
    units = [(0, 1), (1, 3)]
    before = {unit: read_unit(model, unit) for unit in unit_sizes(model)}
    change = random_change(model, units)
    assert apply_step(model, ServerStep(1, packed_change(model, change, value_bits=value_bits))) == set(units)
    for unit, start in before.items():
        moved = read_unit(model, unit) - start
        if unit in units:
            # Gains of pairs without an edge stay at zero.
            where = read_unit(model, unit) != 0
            error = (moved - change[unit])[where].abs().max()
            assert moved.abs().max() > 0 and error < {2: 0.04, 4: 0.01, 8: 0.001, 16: 2e-5}[value_bits]
        else:
            assert not moved.any()


def test_edits_are_made_after_the_change_and_count_as_moved(model):
    step = ServerStep(1, packed_change(model, random_change(model, [(0, 3)])), EDITS)
    assert apply_step(model, step) == {(0, 3), (0, 1), (1, 3)}
    graph = read_graph(model)
    assert not graph.masks[0][0, 1] and graph.masks[1][1, 3] and graph.version == 6
    assert model.expert_layers()[0].edge_gain[0, 1] == 0


def test_an_edge_that_comes_back_starts_from_zero_whatever_a_residual_still_held(model):
    gains = model.expert_layers()[0].edge_gain
    apply_step(model, ServerStep(1, packed_change(model, random_change(model, [(0, 2)])), EDITS))
    apply_step(model, next_step(model, 2))  # brings a change for 0 -> 1, which is no edge any more
    assert gains[0, 1] == 0
    back = [AddEdge(0, 0, 1)]
    apply_step(model, next_step(model, 3, edits=back))
    assert gains[0, 1] == 0
    apply_step(model, next_step(model, 4))
    assert gains[0, 1] != 0


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda step: ServerStep(1, step.packed[:-1], step.edits), "not a packed update"),
        (lambda step: ServerStep(1, b"", step.edits), "not a packed update"),
        (
            lambda step: ServerStep(1, step.packed, [*step.edits, RemoveEdge(0, 0, 3)]),
            "does not exist",
        ),
        (lambda step: ServerStep(1, step.packed, [AddEdge(9, 0, 3)]), "known layer"),
    ],
)
def test_a_damaged_step_is_refused_and_leaves_the_model_as_it_was(model, damage, reason):
    before = copy.deepcopy(model)
    step = next_step(model, 1, edits=EDITS)
    with pytest.raises(RefusedUpdate, match=reason):
        apply_step(model, damage(step))
    assert all_equal(model, before)
    apply_step(model, step)
    assert not all_equal(model, before)


@pytest.mark.parametrize("difference", ["version", "masks"])
def test_a_step_for_another_graph_is_refused(model, difference):
    step, graph = next_step(model, 1), read_graph(model)
    if difference == "version":
        write_graph(model, ExpertGraph(graph.masks, graph.version + 1))
    else:
        model.expert_layers()[1].edges[0, 3] = True
    before = copy.deepcopy(model)
    with pytest.raises(RefusedUpdate, match="graph (version|hash)"):
        apply_step(model, step)
    assert all_equal(model, before)


def test_a_step_of_another_model_is_refused(model):
    step = ServerStep(
        1, packed_change(graph_of(num_experts=8), {(0, 7): torch.ones(3 * 8 * 32 + 32 + 1 + 16)})
    )
    with pytest.raises(RefusedUpdate):
        apply_step(model, step)


@pytest.mark.parametrize(
    "edits", ["", "{", "5", "null", '{"op": 1}', '[{"op": "add-edge"}]', "[1]", "[[[]]]", "[" * 10**5, '"x"']
)
def test_edits_that_cannot_be_read_are_refused(edits):
    with pytest.raises(RefusedUpdate, match="edits of step 3 cannot be read"):
        read_step(3, b"", edits)


def test_edits_as_json_name_every_field():
    assert json.loads(ServerStep(1, b"", EDITS[:1]).edits_json()) == [
        {"op": "remove-edge", "layer": 0, "p": 0, "q": 1, "reason": "why"}
    ]


@pytest.mark.parametrize(("held", "missing"), [(0, [1, 2, 3]), (1, [2, 3]), (3, []), (9, [])])
def test_the_missing_steps_come_oldest_first(held, missing):
    steps = [ServerStep(version, b"") for version in (3, 1, 2)]
    assert [step.version for step in steps_after(steps, held)] == missing


def test_the_size_of_a_step_is_that_of_its_parts():
    step = ServerStep(1, b"12345", EDITS)
    assert step.size() == 5 + len(step.edits_json())


def test_parts_are_told_apart_again():
    for parts in ([b"one"], [b"one", b"two", b"x" * 300], [b"\0" * 8, b"1"]):
        assert split_parts(join_parts(parts)) == parts
    joined = join_parts([b"one", b"two"])
    for cut in range(9, len(joined)):
        if cut != 8 + 8 + 3:  # there one part ends
            with pytest.raises(RefusedUpdate, match="cut short"):
                split_parts(joined[:cut])


def test_a_step_of_several_parts_moves_what_one_part_would():
    model, other = graph_of(), graph_of()
    change = random_change(model, [(0, 1), (1, 2), (1, 3)])
    parts = [packed_change(model, {unit: vector}, value_bits=16) for unit, vector in change.items()]
    assert apply_step(model, ServerStep(1, join_parts(parts))) == set(change)
    for part in parts:
        apply_step(other, ServerStep(1, part))
    assert all_equal(model, other)


@pytest.mark.parametrize("spoil", [lambda parts: [*parts, parts[0]], lambda parts: [*parts, parts[1][:-1]]])
def test_parts_that_meet_or_one_that_is_damaged_leave_the_model_alone(spoil):
    model, before = graph_of(), graph_of()
    parts = [packed_change(model, random_change(model, [unit])) for unit in ((0, 1), (1, 2))]
    with pytest.raises(RefusedUpdate):
        apply_step(model, ServerStep(1, join_parts(spoil(parts))))
    assert all_equal(model, before)


def test_the_sizes_of_a_step_are_those_of_its_parts_together():
    model = graph_of()
    parts = [packed_change(model, random_change(model, [unit])) for unit in ((0, 1), (1, 2))]
    single = [packed_stats(part) for part in parts]
    stats = step_stats(ServerStep(1, join_parts(parts)))
    assert stats.packed_bytes == len(join_parts(parts))
    for name in ("raw_bytes", "entropy_floor_bytes", "index_floor_bytes", "index_bytes", "value_bytes"):
        assert getattr(stats, name) == sum(getattr(each, name) for each in single)
    assert stats.density == pytest.approx(sum(each.density for each in single) / 2)
    assert step_stats(ServerStep(1, parts[0])) == single[0]
    assert step_stats(ServerStep(1, packed_change(model, {}))).density == 0


def test_merged_experts_cannot_be_sent(model):
    step = ServerStep(1, packed_change(model, random_change(model)), [MergeExperts(0, 1, 2)])
    before = copy.deepcopy(model)
    with pytest.raises(RefusedUpdate, match="merge experts offline"):
        apply_step(model, step)
    assert all_equal(model, before)
    with pytest.raises(UserError, match="follow from the graph alone, got merge-experts 0:1 into 2"):
        check_plan(step.edits)
    check_plan(EDITS)
