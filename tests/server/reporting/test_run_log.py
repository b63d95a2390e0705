"""The files of a run: exact shapes, valid JSON whatever comes, and refusal of what readers could not use."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from federated.wire.packed_stats import PackedStats
from server.reporting.run_log import (
    ClientRecord,
    RewireRecord,
    RoundRecord,
    RunLog,
    _append,
    clear_run,
    mean_train_loss,
    pad_masks,
    read_rewirings,
    read_rounds,
    write_atomically,
)

CLIENT = ClientRecord(
    name="recipes",
    budget=4,
    weight=0.25,
    train_loss=2.0,
    perplexity=9.5,
    bytes_up=100,
    bytes_down=40,
    density=0.05,
)
ROUND = RoundRecord(
    round=1,
    seconds=2.5,
    bytes_up=300,
    bytes_down=80,
    bytes_up_dense=9000,
    bytes_down_dense=9000,
    density=0.05,
    edges=[6, 5],
    graph_version=1,
    graph_hash="ab12",
    clients=[CLIENT, replace(CLIENT, name="prose", weight=0.75, train_loss=4.0)],
    perplexity=8.0,
)
EDIT = {"op": "add_edge", "layer": 0, "p": 1, "q": 2, "reason": "demand 31"}
TRACE = {"sequence": 0, "layer": 1, "token": 2, "experts": [3, 1], "parents": [-1, 3], "weights": [1.0, 0.5]}


def make_log(path, experts=(3, 3), **options) -> RunLog:
    return RunLog(path, num_layers=len(experts), experts_per_layer=list(experts), **options)


def strict_json(text: str):
    """Parse JSON as a strict reader does: NaN and Infinity are errors."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_rounds_are_appended_as_lines_with_every_field(tmp_path):
    log = make_log(tmp_path)
    log.round(ROUND)
    log.round(replace(ROUND, round=2))
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines()
    first = strict_json(lines[0])
    assert [strict_json(line)["round"] for line in lines] == [1, 2]
    assert first["clients"][0] == {
        "name": "recipes",
        "budget": 4,
        "weight": 0.25,
        "train_loss": 2.0,
        "perplexity": 9.5,
        "bytes_up": 100,
        "bytes_down": 40,
        "density": 0.05,
        "refused": None,
        "update_bytes": None,
        "update_floor_bytes": None,
        "drift_loss": None,
        "drift_routing": None,
        "drifted": False,
        "start_seconds": None,
    }
    assert (first["drifted"], first["drift_layers"]) == (False, [])
    assert (first["edges"], first["graph_hash"], first["bytes_up_dense"]) == ([6, 5], "ab12", 9000)
    assert first["train_loss"] == pytest.approx(0.25 * 2 + 0.75 * 4)
    assert read_rounds(tmp_path) == [strict_json(line) for line in lines]


def test_numbers_json_lacks_become_null_and_array_scalars_plain(tmp_path):
    bad = replace(CLIENT, train_loss=math.nan, perplexity=math.inf, bytes_up=np.int64(7))
    make_log(tmp_path).round(
        replace(ROUND, clients=[bad], perplexity=torch.tensor(8.0), edges=np.array([1, 2]))
    )
    row = strict_json((tmp_path / "rounds.jsonl").read_text())
    assert (row["clients"][0]["train_loss"], row["clients"][0]["perplexity"]) == (None, None)
    assert (row["clients"][0]["bytes_up"], row["perplexity"], row["edges"]) == (7, 8.0, [1, 2])


def test_a_line_still_being_written_is_not_read(tmp_path):
    make_log(tmp_path).round(ROUND)
    with (tmp_path / "rounds.jsonl").open("a") as stream:
        stream.write('{"round": 2, "sec')
    assert [row["round"] for row in read_rounds(tmp_path)] == [1]
    assert read_rounds(tmp_path / "nowhere") == []


def test_merge_file_has_exactly_the_agreed_keys(tmp_path):
    log = make_log(tmp_path)
    log.rewire(RewireRecord(round=10, rho_max=4, edits=[EDIT], loss_before=2.0, loss_after=math.nan))
    log.rewire(RewireRecord(round=9, rho_max=4, edits=[]))
    assert strict_json((tmp_path / "merge_round10.json").read_text()) == {
        "round": 10,
        "rho_max": 4,
        "edits": [EDIT],
        "loss_before": 2.0,
        "loss_after": None,
        "gamma_hat": None,
        "proposed": [],
    }
    assert [merge["round"] for merge in read_rewirings(tmp_path)] == [9, 10]


@pytest.mark.parametrize("edit", [{"op": "add_edge"}, EDIT | {"extra": 1}])
def test_merge_refuses_edits_with_other_keys(tmp_path, edit):
    with pytest.raises(ValueError, match="keys"):
        make_log(tmp_path).rewire(RewireRecord(round=1, rho_max=4, edits=[edit]))
    assert not list(tmp_path.glob("merge*"))


def test_masks_of_different_sizes_are_padded_with_false(tmp_path):
    masks = [torch.ones(2, 2).triu().bool(), torch.eye(3).bool()]
    make_log(tmp_path, (2, 3)).mask_debug(masks)
    stored = np.load(tmp_path / "mask_debug.npy")
    assert stored.dtype == bool
    assert stored.shape == (2, 3, 3)
    assert stored[0].tolist() == [[True, True, False], [False, True, False], [False, False, False]]
    assert stored[1].tolist() == np.eye(3, dtype=bool).tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["mask_debug.npy"]


def test_a_padded_stack_is_accepted_as_it_is():
    stack = np.zeros((2, 3, 3), dtype=bool)
    stack[:, 0, 1] = True
    assert np.array_equal(pad_masks(stack, experts_per_layer=[2, 3]), stack)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([np.eye(3), np.tril(np.ones((3, 3)))], "upper-triangular mask in layer 1"),
        ([np.eye(3), np.eye(2)], "layer 1 to be"),
        ([np.eye(3)], "expected 2 masks, got 1"),
    ],
)
def test_bad_masks_are_refused_and_nothing_is_written(tmp_path, masks, message):
    with pytest.raises(ValueError, match=message):
        make_log(tmp_path).mask_debug(masks)
    assert not (tmp_path / "mask_debug.npy").exists()


def test_call_trace_is_a_list_of_entries(tmp_path):
    log = make_log(tmp_path)
    log.call_trace([TRACE, TRACE | {"weights": torch.tensor([1.0, math.inf])}])
    entries = strict_json((tmp_path / "expert_call_trace.json").read_text())
    assert entries == [TRACE, TRACE | {"weights": [1.0, None]}]
    log.call_trace([])
    assert strict_json((tmp_path / "expert_call_trace.json").read_text()) == []
    with pytest.raises(ValueError, match="trace entry"):
        log.call_trace([{"token": 1}])


def test_pack_sizes_has_one_header_and_one_row_per_client_and_round(tmp_path):
    sizes = {"index_floor_bytes": 0, "density": 0.1, "index_bytes": 1, "value_bytes": 1}
    log = make_log(tmp_path)
    log.pack_sizes(
        1, "my recipes", PackedStats(raw_bytes=1000, packed_bytes=40, entropy_floor_bytes=39, **sizes)
    )
    log.pack_sizes(2, "prose", PackedStats(raw_bytes=0, packed_bytes=0, entropy_floor_bytes=0, **sizes))
    rows = [line.split() for line in (tmp_path / "pack_sizes.txt").read_text().splitlines()]
    assert rows == [
        ["round", "client", "raw_bytes", "packed_bytes", "ratio", "entropy_floor_bytes"],
        ["1", "my_recipes", "1000", "40", "25.000", "39"],
        ["2", "prose", "0", "0", "nan", "0"],
    ]
    table = np.genfromtxt(tmp_path / "pack_sizes.txt", names=True, dtype=None, encoding="utf-8")
    assert table["packed_bytes"].tolist() == [40, 0]


def test_a_new_log_removes_the_earlier_run_and_a_resumed_one_goes_on(tmp_path):
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine")
    make_log(tmp_path).round(ROUND)
    make_log(tmp_path, resumed=1).round(replace(ROUND, round=2))
    assert len(read_rounds(tmp_path)) == 2
    make_log(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_resumed_log_drops_the_rounds_that_are_repeated_and_torn_lines(tmp_path):
    log = make_log(tmp_path)
    stats = PackedStats(1000, 40, 39, 1, 0.5, 1, 1)
    for number in (1, 2, 3):
        log.round(replace(ROUND, round=number))
        log.pack_sizes(number, "client-0", stats)
        log.rewire(RewireRecord(round=number, rho_max=1, edits=[]))
    for name in ("rounds.jsonl", "pack_sizes.txt"):
        with (tmp_path / name).open("a") as file:
            file.write('{"round": 1' if name == "rounds.jsonl" else "     1  cli")
    make_log(tmp_path, resumed=2)
    assert [row["round"] for row in read_rounds(tmp_path)] == [1, 2]
    assert [row["round"] for row in read_rewirings(tmp_path)] == [1, 2]
    lines = (tmp_path / "pack_sizes.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["round", "1", "2"]


def test_clear_run_removes_every_file_a_log_writes(tmp_path):
    log = make_log(tmp_path)
    log.round(ROUND)
    log.rewire(RewireRecord(round=1, rho_max=1, edits=[]))
    log.mask_debug([np.eye(3), np.eye(3)])
    log.call_trace([TRACE])
    assert len(list(tmp_path.iterdir())) == 4
    clear_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_expert_counts_must_match_the_layers(tmp_path):
    with pytest.raises(ValueError, match="expected 2 expert counts, got 1"):
        RunLog(tmp_path, num_layers=2, experts_per_layer=[4])


def test_mean_train_loss_skips_clients_without_one():
    clients = [
        CLIENT,
        replace(CLIENT, train_loss=None, weight=9.0),
        replace(CLIENT, train_loss=4.0, weight=0.25),
    ]
    assert mean_train_loss(clients) == pytest.approx(3.0)
    assert mean_train_loss([]) is None


def test_write_atomically_leaves_no_partial_file(tmp_path):
    write_atomically(tmp_path / "a.json", "old")
    write_atomically(tmp_path / "a.json", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "new")]


def test_a_line_that_cannot_be_written_whole_leaves_the_file_as_before(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    _append(path, "one\n")

    def full(handle: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("server.reporting.run_log.os.fsync", full)
        with pytest.raises(OSError, match="disk full"):
            _append(path, "two\n")
    assert path.read_text() == "one\n"
    _append(path, "three \u00fc\n")
    assert path.read_text() == "one\nthree \u00fc\n"
