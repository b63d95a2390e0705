"""Run tab: functions on a small run that the federation itself has logged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from models.checkpoints.load import load_graph
from models.graph.graph_state import read_graph
from server.app import run_federation
from server.flower.in_process_grid import RUN_ID
from server.reporting.run_log import read_rewirings, read_rounds
from tests.support.tiny_federation import TinyGrid, tiny_config
from ui.run.current_graph import RunGraph, graph_value, read_first_masks, read_run_graph
from ui.run.records import edits_table, perplexities, rounds_table, state_line, traffic
from ui.run.start import start_arguments

ROUND = {
    "round": 1,
    "seconds": 2.5,
    "train_loss": 3.0,
    "perplexity": 20.0,
    "bytes_up": 1000,
    "bytes_down": 500,
    "bytes_up_dense": 10_000,
    "bytes_down_dense": 10_000,
    "density": 0.5,
    "edges": [3, 4],
    "clients": [
        {"name": "a", "perplexity": 19.0, "refused": None},
        {"name": "b", "perplexity": None, "refused": "late"},
    ],
}
ROUNDS = [ROUND, ROUND | {"round": 2, "perplexity": 10.0}]


def test_curves_have_all_clients_and_each_without_unknown_figures():
    rows = perplexities(ROUNDS).values.tolist()
    assert rows == [[1, "all", 20.0], [1, "a", 19.0], [2, "all", 10.0], [2, "a", 19.0]]
    assert traffic(ROUNDS).values.tolist() == [
        [1, "up", 1.0],
        [2, "up", 2.0],
        [1, "down", 0.5],
        [2, "down", 1.0],
    ]


def test_many_clients_have_one_curve():
    many = ROUND | {"clients": [{"name": str(number), "perplexity": 1.0} for number in range(7)]}
    assert perplexities([many]).values.tolist() == [[1, "all", 20.0]]


def test_the_state_names_round_perplexity_bytes_and_end(tmp_path):
    assert state_line(tmp_path, ROUNDS, None) == (
        f"{tmp_path.name}: round 2, running or interrupted; perplexity 10.000; 2.0 kB up (10 times less than dense), "
        "1.0 kB down (20 times less than dense); 7 edges."
    )
    assert "finished; perplexity" in state_line(tmp_path, ROUNDS, {"stopped": None})
    assert "early stop; perplexity" in state_line(tmp_path, ROUNDS, {"stopped": "early stop"})
    assert state_line(tmp_path, [], None).endswith("no round is complete yet.")


def test_tables_start_with_the_latest():
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", rounds_table(ROUNDS))
    assert cells[:9] == ["2", "2.5", "3", "10", "1000", "500", "0.5", "7", "b: late"] and cells[9] == "1"
    edits = [
        {"round": number, "edits": [{"op": "add-edge", "layer": 0, "p": 1, "q": 2, "reason": "r"}]}
        for number in (1, 2)
    ]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", edits_table(edits))[:6] == [
        "2",
        "add-edge",
        "0",
        "1",
        "2",
        "r",
    ]


def test_the_graph_of_a_run_has_its_edits_and_the_usage_of_its_edges(tmp_path, tiny_graph_dir):
    out = tmp_path / "out"
    config = tiny_config(
        tiny_graph_dir, tmp_path, num_rounds=2, local_steps=1, rho_max=3, out=str(out), keep_best=False
    )
    run_federation(TinyGrid(config), config, run_id=RUN_ID)
    log_dir = Path(config.log_dir)
    found = read_run_graph(log_dir)
    assert any(each["edits"] for each in read_rewirings(log_dir))
    for mask, expected in zip(found.masks, read_graph(load_graph(str(out))).masks, strict=True):
        np.testing.assert_array_equal(mask, expected)
    assert found.usage is not None and sum(each.sum() for each in found.usage) > 0
    assert len(read_rounds(log_dir)) == 2
    masks = read_first_masks(log_dir)
    assert masks is None or masks.ndim == 3


def test_the_picture_has_roots_and_edges_with_their_usage():
    mask = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 1]], dtype=bool)
    usage = np.array([[5, 7.25, 9], [0, 0, 2], [0, 0, 1]], dtype=float)
    value = json.loads(graph_value(RunGraph((mask,), (usage,)), 0))
    assert (
        value["edges"] == [[0, 1, 7.2], [1, 2, 2.0]]
        and value["roots"] == [0, 2]
        and value["entries"] == [5, 0, 1]
    )
    unknown = json.loads(graph_value(RunGraph((mask,), None), 0))
    assert unknown["known"] is False and unknown["edges"] == [[0, 1, 0.0], [1, 2, 0.0]]
    with pytest.raises(UserError, match="layer from 0 to 0, got 1"):
        graph_value(RunGraph((mask,), None), 1)


def test_a_folder_without_a_run_has_no_graph(tmp_path):
    with pytest.raises(UserError, match="expected the state of a run"):
        read_run_graph(tmp_path)
    assert read_first_masks(tmp_path) is None


def test_a_start_is_a_simulation_in_the_folder_of_runs(tmp_path):
    options = {"clients": 2.0, "rounds": 3, "data": "wikimix:law\n\nwikimix", "settings": "local-steps=4\n"}
    arguments = start_arguments(tmp_path / "graph", tmp_path / "run", **options)
    assert " ".join(arguments) == (
        f"simulate --graph {tmp_path}/graph --clients 2 --rounds 3 --data wikimix:law --data wikimix "
        f"--log-dir {tmp_path}/run --out {tmp_path}/run/model --set local-steps=4"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clients": 0}, "1 to 16 clients, got 0"),
        ({"clients": 17}, "got 17"),
        ({"rounds": None}, "at least 1 round"),
        ({"data": "owner/set"}, "`data`"),
        ({"data": ""}, "`data`"),
        ({"settings": "local-steps"}, "key=value"),
        ({"settings": "out=/elsewhere"}, "none of data"),
    ],
)
def test_bad_starts_are_refused(tmp_path, changes, message):
    options = {"clients": 1, "rounds": 1, "data": "wikimix", "settings": ""} | changes
    with pytest.raises(UserError, match=message):
        start_arguments(tmp_path, tmp_path, **options)
