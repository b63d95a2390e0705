from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from clients.residents.assembler import Assembler
from clients.state.residual import ShippedUpdate
from clients.state.store import ClientStore
from experts.graph.expert_graph import ExpertGraph
from federated.data.blocks import Blocks
from models.checkpoints.disk_experts import open_mapped
from tests.models.files.test_checked_file import damaged

BLOCKS = Blocks(torch.arange(12).view(3, 4), torch.arange(12).view(3, 4) - 100)
PLAIN = ExpertGraph((np.eye(2, dtype=bool),))
FOURS = ExpertGraph((np.eye(4, dtype=bool),) * 2)
OTHER = Blocks(torch.tensor([[1, 2**31 - 1]]), torch.tensor([[-100, 3]]))


@pytest.fixture
def store(tmp_path) -> ClientStore:
    return ClientStore(tmp_path / "a" / "client-0")


def again(store: ClientStore) -> ClientStore:
    """The same folder in another process."""
    return ClientStore(store.folder)


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
    first, same, other = (
        store.load_assembler(1, FOURS, 1),
        store.load_assembler(1, FOURS, 1),
        store.load_assembler(2, FOURS, 1),
    )
    assert torch.equal(torch.rand(1), expected_next)  # the caller's random state is left alone
    assert equal_state(first, same) and not equal_state(first, other)
    with torch.no_grad():
        first.root.bias += 1
    store.save_assembler(first, FOURS, 1)
    assert equal_state(again(store).load_assembler(9, FOURS, 2), first)
    assert not equal_state(again(store).load_assembler(9, FOURS, 1), first)  # round 1 starts without it


@pytest.mark.parametrize("damage", ["empty", "half", "garbage", "flipped bit"])
def test_a_damaged_assembler_starts_afresh(store, damage):
    store.save_assembler(store.load_assembler(1, FOURS, 1), FOURS, 1)
    path = store.folder / "assembler-1.safetensors"
    path.write_bytes(damaged(path.read_bytes(), damage))
    assert equal_state(
        store.load_assembler(3, FOURS, 2), ClientStore(store.folder / "none").load_assembler(3, FOURS, 2)
    )


def test_an_assembler_of_another_shape_starts_afresh(store):
    store.save_assembler(Assembler([4, 4], hidden_size=4), FOURS, 1)
    assert equal_state(
        store.load_assembler(3, FOURS, 2), ClientStore(store.folder / "none").load_assembler(3, FOURS, 2)
    )


def test_own_logits_follow_their_experts_through_renumbering(store):
    before = store.load_assembler(1, FOURS, 1)
    with torch.no_grad():
        before.root.bias += 1
        for own in before.own:
            own.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    store.save_assembler(before, FOURS, 1)
    # Of the first layer expert 1 is retired, and one is added; the second layer is as it was.
    masks = (np.eye(4, dtype=bool), np.eye(4, dtype=bool))
    after = store.load_assembler(2, ExpertGraph(masks, 1, ids=((0, 2, 3, 4), (0, 1, 2, 3))), 2)
    assert [own.tolist() for own in after.own] == [[1, 3, 4, 0], [1, 2, 3, 4]]
    assert torch.equal(after.root.bias, before.root.bias)
    grown = store.load_assembler(2, ExpertGraph((np.eye(5, dtype=bool), masks[1]), 1), 2)
    assert grown.own[0].tolist() == [1, 2, 3, 4, 0]


def test_an_assembler_of_another_number_of_layers_starts_afresh(store):
    store.save_assembler(store.load_assembler(1, FOURS, 1), FOURS, 1)
    assert equal_state(
        store.load_assembler(3, PLAIN, 2), ClientStore(store.folder / "x").load_assembler(3, PLAIN, 2)
    )


def equal_state(one: Assembler, other: Assembler) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


def test_nothing_is_written_outside_the_folder(tiny_graph_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = ClientStore(Path("clients/client-0"))
    model = open_mapped(str(tiny_graph_dir), store.copy)
    model.expert_layers()[0].write_expert(1, *model.expert_layers()[0].read_expert(2))
    store.copy.save(model, 1)
    store.save_assembler(store.load_assembler(0, FOURS, 1), FOURS, 1)
    store.blocks(lambda: ("a", BLOCKS, OTHER))
    store.save_residual(1, {(0, 0): torch.ones(2)}, PLAIN, ShippedUpdate(1, b"packed", {}))
    names = ["assembler-1.safetensors", "blocks.safetensors", "experts/1.f32"]
    names += ["global.safetensors", "residual-1.safetensors"]
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [f"clients/client-0/{name}" for name in names]


def test_a_round_starts_from_the_residual_before_it_however_often_it_is_repeated(store):
    assert store.load_residual(1).shipped is None
    for server_round in (1, 2, 2, 5):
        shipped = ShippedUpdate(server_round, b"packed", {})
        store.save_residual(server_round, {(0, 0): torch.full((2,), float(server_round))}, PLAIN, shipped)
    kept = again(store).load_residual(5)
    assert kept.shipped.server_round == 2 and kept.residual[0, 0].tolist() == [2.0, 2.0]
    assert again(store).load_residual(6).shipped.server_round == 5
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "residual-2.safetensors",
        "residual-5.safetensors",
    ]
