from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from clients.state.global_copy import GlobalCopy
from experts.graph.edits import RemoveEdge, edits_from_dicts
from experts.graph.expert_graph import ExpertGraph
from federated.protocol.copy_hash import copy_hash, unit_digest
from federated.protocol.steps import ServerStep, apply_step
from models.checkpoints.disk_experts import open_mapped
from models.checkpoints.load import load_graph
from models.checkpoints.save import save_checkpoint
from models.files.checked_file import write_checked
from models.graph.graph_state import read_graph, write_graph
from models.graph.unit_vectors import OTHERS, read_unit, unit_sizes
from tests.models.files.test_checked_file import DAMAGES, damaged
from tests.support.tiny_federation import all_equal, next_step, packed_change, random_change, save_tiny_graph
from tests.support.tiny_graphs import graph_of, with_random_gains


@pytest.fixture
def base(tmp_path, tiny_tokenizer) -> str:
    directory = tmp_path / "graph"
    directory.mkdir()
    save_checkpoint(with_random_gains(graph_of()), tiny_tokenizer, directory)
    return str(directory)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "client-0"


def opened(base: str, folder) -> tuple[GlobalCopy, object, int]:
    """What another process finds: the copy, the model over it, and the version."""
    kept = GlobalCopy(folder)
    model = open_mapped(base, kept)
    return kept, model, kept.load(model)


def advance(base: str, folder, step: ServerStep) -> None:
    kept, model, version = opened(base, folder)
    apply_step(model, step)
    kept.save(model, version + 1)


def expert_files(folder) -> list[str]:
    return sorted(os.listdir(folder / "experts")) if (folder / "experts").exists() else []


def test_nothing_on_disk_is_version_0_and_the_checkpoint(base, folder):
    _, model, version = opened(base, folder)
    assert version == 0 and all_equal(model, load_graph(base))
    assert not folder.exists()


def test_the_copy_follows_a_model_in_memory_bit_for_bit(base, folder):
    model = load_graph(base)
    for version, units in enumerate([[(0, 1)], [(0, 1), (1, 3)], [(1, 0)]], start=1):
        edits = [RemoveEdge(0, 0, version), RemoveEdge(1, version - 1, 3)]
        packed = packed_change(model, random_change(model, units, seed=version))
        step = ServerStep(version, packed, edits if version > 1 else [])
        apply_step(model, step)
        advance(base, folder, step)
        _, loaded, held = opened(base, folder)
        assert held == version and all_equal(loaded, model)
    # Only what moved is kept: the file of version 1, whose only expert moved again, is gone.
    assert expert_files(folder) == ["2.f32", "3.f32"]


def test_gains_that_edits_took_stay_gone_when_the_edge_comes_back(base, folder):
    model = load_graph(base)
    for version, op in enumerate(("remove-edge", "add-edge"), start=1):
        packed = packed_change(model, random_change(model, [(1, 0)]))
        step = ServerStep(version, packed, edits_from_dicts([{"op": op, "layer": 0, "p": 1, "q": 2}]))
        apply_step(model, step)
        advance(base, folder, step)
    assert load_graph(base).expert_layers()[0].edge_gain[1, 2] != 0
    _, loaded, _ = opened(base, folder)
    assert loaded.expert_layers()[0].edge_gain[1, 2] == 0
    assert all_equal(loaded, model)


def test_a_unit_is_read_where_it_is(base, folder):
    model = load_graph(base)
    change = random_change(model, [(0, 1)])
    advance(base, folder, ServerStep(1, packed_change(model, change)))
    kept, loaded, _ = opened(base, folder)
    assert kept.read((0, 2)) is None and kept.read((0, 1)).numel() == 3 * 16 * 32
    for expert, same in ((1, False), (2, True)):
        before, after = (read_unit(each, (0, expert))[: 3 * 16 * 32] for each in (model, loaded))
        assert torch.equal(before, after) == same


def test_forgetting_goes_back_to_the_checkpoint(base, folder):
    advance(base, folder, next_step(load_graph(base), 1))
    kept, _, version = opened(base, folder)
    assert version == 1
    kept.forget()
    kept.forget()
    _, model, version = opened(base, folder)
    assert version == 0 and all_equal(model, load_graph(base))
    assert expert_files(folder) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_counts_as_version_0(base, folder, damage):
    advance(base, folder, next_step(load_graph(base), 1))
    path = folder / "global.safetensors"
    path.write_bytes(damaged(path.read_bytes(), damage))
    kept, model, version = opened(base, folder)
    assert version == 0 and all_equal(model, load_graph(base))
    # And it works on: a new save takes its place.
    kept.save(model, 2)
    assert opened(base, folder)[2] == 2


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "flipped bit"])
def test_a_damaged_expert_counts_as_version_0(base, folder, damage):
    advance(base, folder, next_step(load_graph(base), 1))
    path = folder / "experts" / "1.f32"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged(path.read_bytes(), damage))
    _, model, version = opened(base, folder)
    assert version == 0 and all_equal(model, load_graph(base))


def test_the_copy_of_another_graph_counts_as_version_0(base, folder, tmp_path, tiny_tokenizer):
    other = str(save_tiny_graph(tmp_path / "other", tiny_tokenizer, num_experts=8))
    advance(other, folder, next_step(load_graph(other), 1))
    _, model, version = opened(base, folder)
    assert version == 0 and all_equal(model, load_graph(base))


@pytest.mark.parametrize("contents", [{}, {"x": torch.ones(1)}, {"mask/1": torch.ones(4, 4)}])
@pytest.mark.parametrize("checked", [True, False])
def test_a_whole_file_with_other_contents_counts_as_version_0(base, folder, contents, checked):
    folder.mkdir(parents=True)
    metadata = {"version": "3", "graph_version": "1", "generation": "1", "experts": "{}"}
    (write_checked if checked else _save)(folder / "global.safetensors", contents, metadata)
    assert opened(base, folder)[2] == 0


def _save(path, tensors, metadata) -> None:
    save_file(tensors, path, metadata=metadata)


def test_a_process_that_dies_between_experts_leaves_the_version_before(base, folder):
    model = load_graph(base)
    first = next_step(model, 1)
    apply_step(model, first)
    advance(base, folder, first)
    _, dying, _ = opened(base, folder)
    apply_step(dying, next_step(model, 2))  # and never saved
    assert expert_files(folder) == ["1.f32", "2.f32"]
    _, loaded, version = opened(base, folder)
    assert version == 1 and all_equal(loaded, model)
    assert expert_files(folder) == ["1.f32"]


def test_the_version_of_the_graph_is_kept(base, folder):
    kept, model, _ = opened(base, folder)
    write_graph(model, ExpertGraph(read_graph(model).masks, 42))
    kept.save(model, 5)
    _, fresh, version = opened(base, folder)
    assert version == 5 and read_graph(fresh).version == 42
    assert json.loads(_metadata(folder)["experts"]) == {}


def _metadata(folder) -> dict[str, str]:
    from safetensors import safe_open

    assert set(load_file(folder / "global.safetensors")) >= {"router/0", "mask/1"}
    with safe_open(folder / "global.safetensors", framework="pt") as file:
        return file.metadata()


def test_the_hash_is_that_of_a_model_in_memory_that_went_the_same_way(base, folder):
    model, moved = load_graph(base), {}
    for version, units in enumerate([[(0, 1), (1, OTHERS)], [(1, 3)], [(0, 1)]], start=1):
        sizes = unit_sizes(model, attention=True)
        change = {unit: torch.full((sizes[unit],), 1e-3 * version) for unit in units}
        step = ServerStep(version, packed_change(model, change), [RemoveEdge(0, 0, version)])
        apply_step(model, step)
        moved |= {unit: unit_digest(model, unit) for unit in units}
        kept, copy, _ = opened(base, folder)
        touched = apply_step(copy, step)
        assert kept.hash(copy, touched) == copy_hash(model, moved)
        kept.save(copy, version, touched)
        fresh, again, _ = opened(base, folder)
        assert fresh.hash(again) == copy_hash(model, moved)


def test_a_whole_expert_of_another_time_counts_as_damage(base, folder):
    model = load_graph(base)
    for version in (1, 2):
        step = ServerStep(version, packed_change(model, random_change(model, [(0, 1)], seed=version)))
        apply_step(model, step)
        advance(base, folder, step)
        if version == 1:
            old = (folder / "experts" / "1.f32").read_bytes()
    (folder / "experts" / "2.f32").write_bytes(old)
    assert opened(base, folder)[2] == 0


def test_starting_over_leaves_the_disk_as_it_is_until_a_save(base, folder):
    model = load_graph(base)
    step = next_step(model, 1)
    advance(base, folder, step)
    apply_step(model, step)
    kept = GlobalCopy(folder)
    kept.start_over()
    fresh = open_mapped(base, kept)
    assert all_equal(fresh, load_graph(base))
    assert all_equal(opened(base, folder)[1], model)
    state = (folder / "global.safetensors").read_bytes()
    kept.write((0, 1), torch.zeros(3 * 16 * 32))
    assert (folder / "global.safetensors").read_bytes() == state and expert_files(folder) == [
        "1.f32",
        "2.f32",
    ]
    kept.save(fresh, 7)
    again, _, version = opened(base, folder)
    assert version == 7 and not again.read((0, 1)).any() and again.read((0, 2)) is None
    assert expert_files(folder) == ["2.f32"]
    GlobalCopy(folder / "absent").start_over()


def test_experts_of_files_that_are_mostly_superseded_move_to_the_new_one(base, folder):
    model = load_graph(base)
    moves = [[(0, 0), (0, 1), (0, 2)], [(0, 0)], [(0, 1)], [(1, 0)]]
    for version, units in enumerate(moves, start=1):
        step = ServerStep(version, packed_change(model, random_change(model, units, seed=version)))
        apply_step(model, step)
        advance(base, folder, step)
    # Of the file of version 1 one expert of three was left after version 3, and moved.
    assert expert_files(folder) == ["2.f32", "3.f32", "4.f32"]
    size = 4 * 3 * 16 * 32
    assert [(folder / "experts" / name).stat().st_size // size for name in expert_files(folder)] == [1, 2, 1]
    _, loaded, version = opened(base, folder)
    assert version == 4 and all_equal(loaded, model)
