from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from clients.state.residual import ResidualStore, ShippedUpdate
from experts.graph.expert_graph import ExpertGraph
from federated.updates.lazy_vectors import LazyVectors

VECTORS = {(0, -1): torch.randn(3), (0, 2): torch.randn(5), (0, 10): torch.randn(2), (11, 0): torch.randn(1)}
SIZES = {unit: vector.numel() for unit, vector in VECTORS.items()}
SHIPPED = ShippedUpdate(7, b"\x00packed\xff", {(0, 2): 5, (11, 0): 1})


def graph_at(version: int) -> ExpertGraph:
    return ExpertGraph((np.eye(3, dtype=bool),), version, ids=((0, 2, 65536),))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "client" / "residual.safetensors"


def assert_same(vectors, expected):
    assert set(vectors) == set(expected)
    assert all(torch.equal(vectors[unit], expected[unit]) for unit in expected)


def test_what_was_saved_comes_back_in_a_new_store(path):
    ResidualStore(path).save(VECTORS, graph_at(3), SHIPPED)
    kept = ResidualStore(path).load()
    assert kept.ids == ((0, 2, 65536),)
    assert_same(kept.residual, VECTORS)
    assert (kept.sizes, kept.shipped, kept.graph_version) == (SIZES, SHIPPED, 3)


def test_absent_and_empty_residuals_are_empty(path):
    kept = ResidualStore(path).load()
    assert (dict(kept.residual), kept.shipped, kept.graph_version) == ({}, None, None)
    ResidualStore(path).save({}, graph_at(1))
    kept = ResidualStore(path).load()
    assert (dict(kept.residual), kept.shipped, kept.graph_version) == ({}, None, 1)


def test_a_save_replaces_everything_and_leaves_no_partial_file(path):
    store = ResidualStore(path)
    store.save(VECTORS, graph_at(1), SHIPPED)
    (path.parent / f".{path.name}.abc.partial").write_bytes(b"of a process that was killed")
    store.save({(4, 4): torch.ones(2, dtype=torch.bfloat16), (4, 5): torch.zeros(3)}, graph_at(2))
    kept = store.load()
    assert_same(kept.residual, {(4, 4): torch.ones(2)})
    assert kept.residual[(4, 4)].dtype == torch.float32 and kept.shipped is None
    assert os.listdir(path.parent) == [path.name]


def test_views_of_one_tensor_are_saved(path):
    base = torch.arange(1, 7.0)
    ResidualStore(path).save({(0, 0): base[::2], (0, 1): base[3:]}, graph_at(0))
    assert_same(ResidualStore(path).load().residual, {(0, 0): base[::2], (0, 1): base[3:]})


def test_vectors_may_be_computed_from_the_file_that_they_replace(path):
    store = ResidualStore(path)
    store.save(VECTORS, graph_at(1))
    for _ in range(2):
        old = store.load().residual
        store.save(LazyVectors(old, lambda unit, old=old: 2 * old[unit]), graph_at(1))
    assert_same(store.load().residual, {unit: 4 * vector for unit, vector in VECTORS.items()})


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "a bit", "no version"])
def test_a_damaged_file_is_set_aside_with_a_warning(path, damage, caplog):
    store = ResidualStore(path)
    store.save(VECTORS, graph_at(1), SHIPPED)
    data = path.read_bytes()
    contents = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "garbage": b"\xff" * 100,
        "a bit": data[:-3] + bytes([data[-3] ^ 4]) + data[-2:],
        "no version": data.replace(b"graph_version", b"graph_versiom"),
    }
    path.write_bytes(contents[damage])
    with caplog.at_level(logging.WARNING):
        kept = store.load()
    assert dict(kept.residual) == {} and kept.shipped is None
    assert "starting empty" in caplog.text
    assert not path.exists() and path.with_name(path.name + ".broken").exists()
    store.save(VECTORS, graph_at(2))
    assert_same(store.load().residual, VECTORS)


def test_a_crash_at_any_write_keeps_the_pair_of_the_round_before(path, monkeypatch):
    """Every read of a vector, every write to the file and every step of replacing it fails once."""
    store = ResidualStore(path)
    store.save(VECTORS, graph_at(1), SHIPPED)
    crashes = 0
    for step in range(100):
        left = iter([False] * step + [True])
        with monkeypatch.context() as patch:
            for name in ("fdopen", "chmod", "replace"):
                patch.setattr(f"configs.output.os.{name}", _crashing(getattr(os, name), left))
            vectors = LazyVectors(VECTORS, _crashing(lambda unit: -VECTORS[unit], left))
            try:
                store.save(vectors, graph_at(2), ShippedUpdate(8, b"next", {}))
            except InterruptedError:
                crashes += 1
                kept = ResidualStore(path).load()
                assert_same(kept.residual, VECTORS)
                assert (kept.shipped, kept.graph_version) == (SHIPPED, 1)
                continue
        break
    assert crashes == len(VECTORS) + 3
    kept = ResidualStore(path).load()
    assert kept.shipped is not None and kept.shipped.server_round == 8 and kept.graph_version == 2
    assert_same(kept.residual, {unit: -vector for unit, vector in VECTORS.items()})


def _crashing(call, left):
    def wrapped(*arguments, **options):
        if next(left, False):
            raise InterruptedError("killed")
        return call(*arguments, **options)

    return wrapped


SAVES_FOR_EVER = """
import itertools, sys
from pathlib import Path
import torch
from clients.state.residual import ResidualStore, ShippedUpdate
from experts.graph.expert_graph import ExpertGraph
store = ResidualStore(Path(sys.argv[1]))
for number in itertools.count(1):
    vectors = {(0, e): torch.full((50_000,), float(number)) for e in range(4)}
    store.save(vectors, ExpertGraph((), number), ShippedUpdate(number, str(number).encode(), {(0, 0): 50_000}))
    print(number, flush=True)
"""


def test_a_process_that_is_killed_while_it_saves_leaves_a_pair(path):
    for delay in (0.0, 0.003, 0.011):
        writer = subprocess.Popen([sys.executable, "-c", SAVES_FOR_EVER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        saved = [json.loads(writer.stdout.readline()) for _ in range(5)][-1]
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        kept = ResidualStore(path).load()
        number = kept.graph_version
        assert number is not None and number >= saved
        assert kept.shipped == ShippedUpdate(number, str(number).encode(), {(0, 0): 50_000})
        assert_same(kept.residual, {(0, e): torch.full((50_000,), float(number)) for e in range(4)})
