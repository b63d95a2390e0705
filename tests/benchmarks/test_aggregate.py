from __future__ import annotations

import math

import numpy as np
import torch

from benchmarks.aggregate import measure, write_replies
from benchmarks.support.aggregate_server import METHODS, packed_round
from federated.wire.codec import unpack_update
from models.graph.unit_vectors import read_unit, unit_sizes
from server.model.global_model import GlobalModel
from tests.support.tiny_federation import save_tiny_graph


def test_a_quick_run_gives_every_figure():
    measured = measure(True, lambda stage, done, total: None)
    assert set(measured.figures) == {"rss_ratio_64_over_2"}
    assert math.isfinite(measured.figures["rss_ratio_64_over_2"])
    assert measured.peers["settings"]["clients"] == [2, 8]
    for method in ("packed", "dense"):
        assert measured.peers["density 0.05"][f"{method}, 8 clients"]["round_seconds"] > 0


def test_the_median_is_aggregated_in_the_same_round(tmp_path, tiny_tokenizer):
    graph = save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=4, visits=2)
    server = GlobalModel(str(graph))
    start = read_unit(server.model, (0, 1))
    write_replies(server.model, tmp_path / "replies", clients=3, density=1.0)
    updates = sorted((tmp_path / "replies").glob("*.update"))
    METHODS["median"](server, updates, tmp_path / "scratch")
    sizes = unit_sizes(server.model)
    vectors = [unpack_update(path.read_bytes(), sizes=sizes).vectors[0, 1].to_dense() for path in updates]
    expected = np.median(vectors, axis=0)
    moved = (read_unit(server.model, (0, 1)) - start).numpy()[: 3 * 16 * 32]
    assert np.linalg.norm(moved - expected[: moved.size]) / np.linalg.norm(expected) < 0.15


def test_the_round_that_is_measured_moves_the_model_by_the_mean_of_the_replies(tmp_path, tiny_tokenizer):
    graph = save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=4, visits=2)
    server = GlobalModel(str(graph))
    start = read_unit(server.model, (0, 1))
    assert write_replies(server.model, tmp_path / "replies", clients=3, density=1.0) > 1000
    updates = sorted((tmp_path / "replies").glob("*.update"))
    packed_round(server, updates, tmp_path / "scratch")
    sizes = unit_sizes(server.model)
    vectors = [unpack_update(path.read_bytes(), sizes=sizes).vectors[0, 1].to_dense() for path in updates]
    expected = np.average(vectors, axis=0, weights=[100, 101, 102])
    moved = (read_unit(server.model, (0, 1)) - start).numpy()[: 3 * 16 * 32]
    error = np.linalg.norm(moved - expected[: moved.size]) / np.linalg.norm(expected)
    assert error < 0.15  # the server's own step is quantized, too
    assert torch.isfinite(read_unit(server.model, (0, 1))).all() and server.version == 1
