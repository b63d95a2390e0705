from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clients.store import ClientStore
from experts.edits import Edit
from experts.graph import ExpertGraph
from federated.blocks import Blocks
from federated.steps import apply_step
from models.assembler import Assembler
from models.checkpoint import read_graph, write_graph
from tests.tiny_federation import all_equal, next_step, packed_change, random_change
from tests.tiny_graphs import graph_of, with_random_gains

BLOCKS = Blocks(torch.arange(12).view(3, 4), torch.arange(12).view(3, 4) - 100)
OTHER = Blocks(torch.tensor([[1, 2**31 - 1]]), torch.tensor([[-100, 3]]))


@pytest.fixture
def store(tmp_path) -> ClientStore:
    return ClientStore(tmp_path / "a" / "client-0")


def again(store: ClientStore) -> ClientStore:
    """The same folder in another process."""
    return ClientStore(store.folder)


def test_nothing_on_disk_is_version_0_and_the_base(store):
    model = graph_of()
    assert store.load_global(model) == 0
    assert all_equal(model, graph_of())
    assert not store.folder.exists()


def test_the_global_model_comes_back_bit_for_bit_over_several_saves(store):
    model = with_random_gains(graph_of())
    base = lambda: with_random_gains(graph_of())  # noqa: E731
    for version, units in enumerate([[(0, 1)], [(0, 1), (1, 3)], [(1, 0)]], start=1):
        edits = [Edit("remove-edge", 0, 0, version), Edit("remove-edge", 1, version - 1, 3)]
        step = next_step(model, version, edits=edits if version > 1 else [])
        step = type(step)(
            version, packed_change(model, random_change(model, units, seed=version)), step.edits
        )
        moved = apply_step(model, step)
        again(store).save_global(model, moved, version)
        loaded = base()
        assert again(store).load_global(loaded) == version
        assert all_equal(loaded, model)
    kept = {name for name in load_file(store.folder / "global.safetensors") if name.startswith("unit/")}
    assert kept == {"unit/0.1", "unit/0.2", "unit/0.3", "unit/1.0", "unit/1.3"}


def test_gains_that_edits_took_stay_gone_when_the_edge_comes_back(store):
    """The expert itself never moved, so only the edit can tell that it must be kept."""
    model = with_random_gains(graph_of())
    for version, op in enumerate(("remove-edge", "add-edge"), start=1):
        step = next_step(model, version, edits=[Edit(op, 0, 1, 2)])
        step = type(step)(version, packed_change(model, random_change(model, [(1, 0)])), step.edits)
        store.save_global(model, apply_step(model, step), version)
    loaded = with_random_gains(graph_of())
    assert loaded.expert_layers()[0].edge_gain[1, 2] != 0
    assert store.load_global(loaded) == 2
    assert loaded.expert_layers()[0].edge_gain[1, 2] == 0
    assert all_equal(loaded, model)


def test_forgetting_goes_back_to_the_base(store):
    model = graph_of()
    store.save_global(model, apply_step(model, next_step(model, 1)), 1)
    store.forget_global()
    store.forget_global()
    fresh = graph_of()
    assert store.load_global(fresh) == 0 and all_equal(fresh, graph_of())


def damaged(data: bytes, damage: str) -> bytes:
    middle = len(data) // 2
    return {
        "empty": b"",
        "half": data[:middle],
        "one byte short": data[:-1],
        "garbage": b"\xff" * 300,
        "flipped bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "last bit": data[:-1] + bytes([data[-1] ^ 1]),
        "other version": data.replace(b'"version":"1"', b'"version":"7"'),
        "other checksum": data.replace(b'"checksum":"', b'"checksun":"'),
    }[damage]


DAMAGES = [
    "empty",
    "half",
    "one byte short",
    "garbage",
    "flipped bit",
    "last bit",
    "other version",
    "other checksum",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_global_model_counts_as_version_0(store, damage):
    model = graph_of()
    store.save_global(model, apply_step(model, next_step(model, 1)), 1)
    path = store.folder / "global.safetensors"
    path.write_bytes(damaged(path.read_bytes(), damage))
    fresh = graph_of()
    assert store.load_global(fresh) == 0
    assert all_equal(fresh, graph_of())
    # And the store works on: a new save takes its place.
    store.save_global(model, {(0, 0)}, 2)
    assert store.load_global(fresh) == 2


def test_the_copy_of_another_graph_counts_as_version_0(store):
    other = graph_of(num_experts=8)
    store.save_global(other, {(0, 7), (0, 0)}, 3)
    model = graph_of()
    assert store.load_global(model) == 0 and all_equal(model, graph_of())
    store.save_global(model, {(0, 1)}, 1)
    assert store.load_global(graph_of()) == 1


@pytest.mark.parametrize(
    "contents", [{}, {"unit/0": torch.ones(2)}, {"x": torch.ones(1)}, {"mask/1": torch.ones(4, 4)}]
)
def test_a_whole_file_with_other_contents_counts_as_version_0(store, contents):
    store.folder.mkdir(parents=True)
    save_file(contents, store.folder / "global.safetensors", metadata={"version": "3", "graph_version": "1"})
    assert store.load_global(graph_of()) == 0


def test_the_copy_on_disk_survives_a_save_that_dies(store, monkeypatch):
    model = graph_of()
    store.save_global(model, apply_step(model, next_step(model, 1)), 1)
    with monkeypatch.context() as patch:

        def die(*_):
            raise OSError("killed")

        patch.setattr("configs.output.os.replace", die)
        with pytest.raises(OSError, match="killed"):
            store.save_global(model, {(0, 0)}, 2)
    assert os.listdir(store.folder) == ["global.safetensors"]
    assert store.load_global(graph_of()) == 1


def test_blocks_are_made_once(store):
    calls = []

    def make():
        calls.append(1)
        return "näme", BLOCKS, OTHER

    for each in (store, store, again(store)):
        name, train, valid = each.blocks(make)
        assert name == "näme" and len(calls) == 1
        for blocks, expected in ((train, BLOCKS), (valid, OTHER)):
            assert torch.equal(blocks.input_ids, expected.input_ids)
            assert torch.equal(blocks.labels, expected.labels)
            assert blocks.input_ids.dtype == blocks.labels.dtype == torch.int64


@pytest.mark.parametrize("damage", ["empty", "half", "garbage", "flipped bit"])
def test_damaged_blocks_are_made_anew(store, damage):
    store.blocks(lambda: ("a", BLOCKS, OTHER))
    path = store.folder / "blocks.safetensors"
    path.write_bytes(damaged(path.read_bytes(), damage))
    assert store.blocks(lambda: ("b", OTHER, BLOCKS))[0] == "b"
    assert again(store).blocks(lambda: pytest.fail("made twice"))[0] == "b"


def test_blocks_that_cannot_be_made_leave_nothing_behind(store):
    def fail():
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        store.blocks(fail)
    assert not store.folder.exists()


def test_an_assembler_comes_from_its_seed_then_from_disk(store):
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    first, same, other = store.load_assembler(1), store.load_assembler(1), store.load_assembler(2)
    assert torch.equal(torch.rand(1), expected_next)  # the caller's random state is left alone
    assert equal_state(first, same) and not equal_state(first, other)
    with torch.no_grad():
        first.root.bias += 1
    store.save_assembler(first)
    assert equal_state(again(store).load_assembler(9), first)


@pytest.mark.parametrize("damage", ["empty", "half", "garbage", "flipped bit"])
def test_a_damaged_assembler_starts_afresh(store, damage):
    store.save_assembler(store.load_assembler(1))
    path = store.folder / "assembler.safetensors"
    path.write_bytes(damaged(path.read_bytes(), damage))
    assert equal_state(store.load_assembler(3), ClientStore(store.folder / "none").load_assembler(3))


def test_an_assembler_of_another_shape_starts_afresh(store):
    store.save_assembler(Assembler(hidden_size=4))
    assert equal_state(store.load_assembler(3), ClientStore(store.folder / "none").load_assembler(3))


def equal_state(one: Assembler, other: Assembler) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


def test_nothing_is_written_outside_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store, model = ClientStore(Path("clients/client-0")), graph_of()
    store.save_global(model, {(0, 0)}, 1)
    store.save_assembler(store.load_assembler(0))
    store.blocks(lambda: ("a", BLOCKS, OTHER))
    store.residual.save({(0, 0): torch.ones(2)}, 0)
    names = ["assembler", "blocks", "global", "residual"]
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [f"clients/client-0/{name}.safetensors" for name in names]


def test_the_version_of_the_graph_is_kept(store):
    model = graph_of()
    write_graph(model, ExpertGraph(read_graph(model).masks, 42))
    store.save_global(model, set(), 5)
    fresh = graph_of()
    assert store.load_global(fresh) == 5
    assert read_graph(fresh).version == 42
