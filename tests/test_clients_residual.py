from __future__ import annotations

import logging
import os

import pytest
import torch

from clients.residual import ResidualStore

VECTORS = {(0, -1): torch.randn(3), (0, 2): torch.randn(5), (11, 0): torch.randn(1)}
SIZES = {unit: vector.numel() for unit, vector in VECTORS.items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "client" / "residual.safetensors"


def assert_same(vectors, expected):
    assert set(vectors) == set(expected)
    assert all(torch.equal(vectors[unit], expected[unit]) for unit in expected)


def test_saved_vectors_come_back_in_a_new_store(path):
    ResidualStore(path).save(VECTORS, 3)
    assert_same(ResidualStore(path).load(3), VECTORS)
    assert_same(ResidualStore(path).load(3, sizes=SIZES), VECTORS)


def test_absent_and_empty_residuals_are_empty(path):
    assert ResidualStore(path).load(0) == {}
    ResidualStore(path).save({}, 1)
    assert ResidualStore(path).load(1) == {}


def test_a_save_replaces_everything_and_leaves_no_partial_file(path):
    store = ResidualStore(path)
    store.save(VECTORS, 1)
    store.save({(4, 4): torch.ones(2, dtype=torch.bfloat16)}, 2)
    loaded = store.load(2)
    assert_same(loaded, {(4, 4): torch.ones(2)})
    assert loaded[(4, 4)].dtype == torch.float32 and os.listdir(path.parent) == [path.name]


def test_views_of_one_tensor_are_saved(path):
    base = torch.arange(6.0)
    ResidualStore(path).save({(0, 0): base[::2], (0, 1): base[3:]}, 0)
    assert_same(ResidualStore(path).load(0), {(0, 0): base[::2], (0, 1): base[3:]})


def test_units_that_are_gone_or_have_another_size_are_dropped(path):
    store = ResidualStore(path)
    store.save(VECTORS, 1)
    assert_same(store.load(2, sizes={(0, 2): 5, (11, 0): 9, (7, 7): 2}), {(0, 2): VECTORS[(0, 2)]})
    assert store.load(2) == {}


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "nan", "no version"])
def test_a_file_that_cannot_be_read_is_set_aside_with_a_warning(path, damage, caplog):
    store = ResidualStore(path)
    store.save(VECTORS | ({(1, 1): torch.tensor([float("nan")])} if damage == "nan" else {}), 1)
    data = path.read_bytes()
    contents = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "garbage": b"\xff" * 100,
        "no version": data.replace(b"graph_version", b"graph_versiom"),
    }
    path.write_bytes(contents.get(damage, data))
    with caplog.at_level(logging.WARNING):
        assert store.load(1) == {}
    assert "starting empty" in caplog.text
    assert not path.exists() and path.with_name(path.name + ".broken").exists()
    store.save(VECTORS, 2)
    assert_same(store.load(2), VECTORS)


def test_a_crash_while_saving_keeps_the_round_before(path, monkeypatch):
    store = ResidualStore(path)
    store.save(VECTORS, 1)

    def crash(*_):
        raise OSError("killed")

    monkeypatch.setattr("clients.residual.os.replace", crash)
    with pytest.raises(OSError, match="killed"):
        store.save({(0, 0): torch.ones(1)}, 2)
    monkeypatch.undo()
    assert_same(store.load(1), VECTORS)
