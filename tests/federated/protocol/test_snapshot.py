from __future__ import annotations

import copy

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from experts.graph.edits import RemoveEdge, RetireExpert, SpawnExpert
from experts.graph.expert_graph import ExpertGraph
from federated.protocol import snapshot
from federated.protocol.snapshot import apply_snapshot, pack_snapshot
from federated.protocol.steps import ServerStep, apply_step
from federated.updates.update import RefusedUpdate
from models.graph.attention_vectors import read_attention, write_attention
from models.graph.graph_state import read_graph, write_graph
from models.graph.unit_vectors import OTHERS
from tests.support.tiny_federation import all_equal, packed_change, random_change
from tests.support.tiny_graphs import graph_of, with_random_gains

MOVED = [(0, 1), (1, 0), (1, 3)]


@pytest.fixture(scope="module")
def base():
    return with_random_gains(graph_of())


@pytest.fixture(scope="module")
def moved(base):
    """Two steps and an edit on."""
    model = copy.deepcopy(base)
    for version, units in enumerate((MOVED[:2], MOVED[1:]), start=1):
        change = random_change(model, units, seed=version, scale=10.0**-version)
        edits = [RemoveEdge(0, 0, 2)] if version == 1 else []
        apply_step(model, ServerStep(version, packed_change(model, change), edits))
    return model


@pytest.fixture(scope="module")
def packed(base, moved):
    return pack_snapshot(moved, base, MOVED, 2)


def test_it_turns_the_base_into_the_model_bit_for_bit(base, moved, packed):
    model = copy.deepcopy(base)
    assert apply_snapshot(model, packed, 2) == set(MOVED)
    assert all_equal(model, moved) and read_graph(model).version == 1


def test_the_same_state_gives_the_same_bytes(base, moved, packed):
    assert pack_snapshot(copy.deepcopy(moved), base, reversed(MOVED), 2) == packed


def test_a_model_that_never_moved(base):
    model = copy.deepcopy(base)
    data = pack_snapshot(model, base, [], 0)
    assert apply_snapshot(model, data, 0) == set() and all_equal(model, base)
    assert len(data) < 2500


def test_attention_rides_along(base):
    model, fresh = copy.deepcopy(base), copy.deepcopy(base)
    write_attention(model, 1, read_attention(model, 1) * 1.5)
    assert apply_snapshot(fresh, pack_snapshot(model, base, [(1, OTHERS)], 1), 1) == {(1, OTHERS)}
    assert all_equal(fresh, model)


def test_any_bit_pattern_survives(base):
    model, fresh = copy.deepcopy(base), copy.deepcopy(base)
    extremes = [0.0, -0.0, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38, 1.0, -1.0]
    with torch.no_grad():
        model.expert_layers()[0].gate_up_proj[2].view(-1)[:8] = torch.tensor(extremes)
        model.expert_layers()[0].gate_up_proj[2].view(-1)[8:16] *= -1
    apply_snapshot(fresh, pack_snapshot(model, base, [(0, 2)], 1), 1)
    ours, theirs = (m.expert_layers()[0].gate_up_proj.view(torch.int32) for m in (fresh, model))
    assert torch.equal(ours, theirs)


def test_entries_that_did_not_move_cost_next_to_nothing(base):
    model = copy.deepcopy(base)
    with torch.no_grad():
        for index in range(0, 512, 100):
            model.expert_layers()[0].down_proj[1].view(-1)[index] += 1e-3
    empty = len(pack_snapshot(base, base, [], 1))
    assert len(pack_snapshot(model, base, [(0, 1)], 1)) < empty + 300


def parts(data: bytes) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(bytes(view["data"]), dtype=np.uint8)
        for name, view in safetensors.deserialize(data)
    }


def test_every_flipped_byte_and_every_cut_is_refused(base, packed):
    model = copy.deepcopy(base)
    for position in range(0, len(packed), max(1, len(packed) // 150)):
        damaged = bytearray(packed)
        damaged[position] ^= 0x20
        with pytest.raises(RefusedUpdate):
            apply_snapshot(model, bytes(damaged), 2)
        with pytest.raises(RefusedUpdate):
            apply_snapshot(model, packed[:position], 2)
    assert all_equal(model, base)


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_no_bytes_raise_anything_else(data):
    with pytest.raises(RefusedUpdate):
        apply_snapshot(None, data, 0)  # nothing is asked of the model before the checksum


def test_another_version_is_refused(base, packed):
    with pytest.raises(RefusedUpdate, match="version 3, got one of version 2"):
        apply_snapshot(copy.deepcopy(base), packed, 3)


def resealed(monkeypatch, data: bytes, **changes) -> bytes:
    """With parts changed, and a checksum that fits them: what a hostile sender could make."""
    monkeypatch.setattr("federated.protocol.snapshot._checksum", lambda header, columns: header.checksum)
    changed = parts(data) | {name: np.frombuffer(part, np.uint8) for name, part in changes.items() if part}
    for name, part in changes.items():
        if part is None:
            del changed[name]
    return save(changed)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"unit.9.0": b"\0"}, "unknown part 'unit.9.0'"),
        ({"unit.0.4": b"\0"}, "unknown part 'unit.0.4'"),
        ({"unit.0.-2": b"\0"}, "unknown part"),
        ({"rubbish": b"\0"}, "unknown part 'rubbish'"),
        ({"routing.1": None}, "expected routing.1"),
        ({"mask.0": b"\xff"}, "expected a mask of 4 experts in layer 0"),
        ({"mask.0": b"\xff\xff"}, "upper-triangular"),
        ({"mask.1": b"\x40\x01"}, "within reach"),
        ({"unit.0.1": b"\x00\x01\x02"}, "expected a column of 1536 values"),
        ({"routing.0": b"\x07"}, "unknown column coding"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_whatever_its_checksum(
    base, packed, monkeypatch, changes, reason
):
    with pytest.raises(RefusedUpdate, match=reason):
        apply_snapshot(copy.deepcopy(base), resealed(monkeypatch, packed, **changes), 2)


def test_values_that_are_not_finite_are_refused(base):
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.expert_layers()[1].gate_up_proj[0, 0, 0] = float("nan")
    with pytest.raises(RefusedUpdate, match="finite values of .1, 0."):
        apply_snapshot(copy.deepcopy(base), pack_snapshot(model, base, [(1, 0)], 1), 1)


def test_the_graph_comes_with_its_version(base):
    model, fresh = copy.deepcopy(base), copy.deepcopy(base)
    write_graph(model, ExpertGraph(read_graph(model).masks, 17))
    apply_snapshot(fresh, pack_snapshot(model, base, [], 3), 3)
    assert read_graph(fresh).digest() == read_graph(model).digest()


@pytest.fixture(scope="module")
def grown(base):
    model = copy.deepcopy(base)
    apply_step(
        model,
        ServerStep(1, packed_change(model, random_change(model)), [SpawnExpert(0, 1, 4), RetireExpert(1, 0)]),
    )
    return model


def test_it_carries_spawned_and_retired_experts(base, grown):
    moved = [(0, expert) for expert in range(5)] + [(1, expert) for expert in range(3)]
    fresh = copy.deepcopy(base)
    assert apply_snapshot(fresh, pack_snapshot(grown, copy.deepcopy(base), moved, 1), 1) == set(moved)
    assert all_equal(fresh, grown) and read_graph(fresh).digest() == read_graph(grown).digest()


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"ids": [[0, 1, 2, 3]]}, "identities of the experts of every layer"),
        ({"ids": [[0, 1, 2, 3], []]}, "identities of the experts of every layer"),
        ({"ids": [[0, 1, 2, 2], [0, 1, 2, 3]]}, "identities of the experts of every layer"),
        ({"ids": [list(range(5000)), [0, 1, 2, 3]]}, "identities of the experts of every layer"),
        ({"ids": [[-1, 1, 2, 3], [0, 1, 2, 3]]}, "ids.0.0 .* greater than or equal to 0"),
        ({"attached": [[9], []]}, "expected an attached expert"),
        ({"attached": [[1]]}, "one list of attached experts"),
    ],
)
def test_experts_that_do_not_fit_are_refused(base, grown, monkeypatch, header, reason):
    made = snapshot.SnapshotHeader

    def altered(**values):
        return made.model_construct(format=1, checksum="", **(values | header))

    monkeypatch.setattr(snapshot, "SnapshotHeader", altered)
    data = pack_snapshot(copy.deepcopy(base), copy.deepcopy(base), [], 1)
    monkeypatch.setattr(snapshot, "SnapshotHeader", made)
    with pytest.raises(RefusedUpdate, match=reason):
        apply_snapshot(copy.deepcopy(base), data, 1)
