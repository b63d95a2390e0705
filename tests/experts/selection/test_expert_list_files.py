from __future__ import annotations

import json

import pytest

from configs.errors import UserError
from experts.selection.expert_list import load_expert_list, read_ranks
from experts.selection.expert_list_files import read_list

HEADER = "layer,expert,rank_sum,action\n"


def csv_of(tmp_path, text: str):
    path = tmp_path / "list.csv"
    path.write_bytes(text.encode())
    return path


def json_of(tmp_path, value) -> object:
    path = tmp_path / "list.json"
    path.write_text(json.dumps(value))
    return path


def test_rows_may_come_in_any_order_with_more_columns_and_from_a_spreadsheet(tmp_path):
    rows = (
        "note,action,rank_sum, layer,expert",
        ",keep,2,3,1",
        ",Prune,3.5,0,1",
        "best, keep,1,3,0",
        ",keep,1,0,0",
    )
    read = load_expert_list(csv_of(tmp_path, "\ufeff" + "\r\n".join(rows)))
    assert {layer: ids.tolist() for layer, ids in read.items()} == {0: [0], 3: [0, 1]}
    assert list(read) == [0, 3]
    assert read_ranks(tmp_path / "list.csv") == {0: {0: 1.0, 1: 3.5}, 3: {0: 1.0, 1: 2.0}}


def test_a_layer_of_which_nothing_is_kept_is_empty_and_not_missing(tmp_path):
    read = load_expert_list(csv_of(tmp_path, HEADER + "0,0,1,merge\n0,1,2,prune\n"))
    assert list(read) == [0] and read[0].tolist() == []


@pytest.mark.parametrize("name", ["layer", "expert", "rank_sum", "action"])
def test_missing_columns_are_named(tmp_path, name):
    columns = [column for column in HEADER.strip().split(",") if column != name]
    with pytest.raises(UserError, match=f"list.csv without {name}$"):
        load_expert_list(csv_of(tmp_path, ",".join(columns) + "\n0,0,0\n"))


def test_all_missing_columns_are_named_at_once(tmp_path):
    with pytest.raises(UserError, match="without rank_sum, action"):
        load_expert_list(csv_of(tmp_path, "layer,expert\n0,1\n"))


@pytest.mark.parametrize(
    "rows, words",
    [
        ("", "at least one layer"),
        ("0,0,1,drop\n", "line 2: expected an action of keep, prune, merge, got 'drop'"),
        ("0,0,1,prun\n", "did you mean 'prune'"),
        ("0,0,1\n", "line 2: expected an action"),
        ("0,0,1,keep\n0,0,1,keep\n", "line 3: expert 0 of layer 0 is there twice"),
        ("0,0,1,keep\n0,0,1,prune\n", "line 3: expert 0 of layer 0 is there twice"),
        ("0,-1,1,keep\n", "at least 0, got 0 and -1"),
        ("-1,0,1,keep\n", "at least 0, got -1 and 0"),
        ("0,one,1,keep\n", "whole number as expert, got 'one'"),
        ("0.5,0,1,keep\n", "whole number as layer, got '0.5'"),
        ("0,0,best,keep\n", "number as rank_sum, got 'best'"),
        ("0,99999999999999999999,1,keep\n", "63 bits"),
        (f"0,0,1,{'k' * 200_000}\n", "list.csv, line"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        load_expert_list(csv_of(tmp_path, HEADER + rows))


@pytest.mark.parametrize(
    "keep_map, words",
    [
        ({}, "at least one layer"),
        ([[0]], "without it"),
        (None, "without it"),
        ({"first": [0]}, "got 'first'"),
        ({"-1": [0]}, "got '-1'"),
        ({"0": [0], "00": [1]}, "got '00'"),
        ({"0": 1}, "list of expert ids, got 1"),
        ({"0": [1.0]}, "list of expert ids"),
        ({"0": [True]}, "list of expert ids"),
        ({"0": [-1]}, "list of expert ids"),
        ({"0": ["1"]}, "list of expert ids"),
        ({"0": [1, 1]}, "layer 0: expected every expert once"),
        ({"0": [2**64]}, "63 bits"),
    ],
)
def test_a_malformed_map_is_refused(tmp_path, keep_map, words):
    with pytest.raises(UserError, match=words):
        load_expert_list(json_of(tmp_path, {"version": "1.0", "keep_map": keep_map}))


def test_layers_and_experts_of_a_map_come_sorted(tmp_path):
    read = read_list(json_of(tmp_path, {"version": "1.0", "keep_map": {"10": [3, 1], "2": [0]}}))
    assert [(layer, ids.tolist(), ranks) for layer, (ids, ranks) in read.items()] == [
        (2, [0], {}),
        (10, [1, 3], {}),
    ]


def test_an_unknown_version_warns_and_is_read(tmp_path):
    path = json_of(tmp_path, {"version": "3.0", "keep_map": {"0": [1]}})
    with pytest.warns(UserWarning, match="version '3.0'"):
        assert load_expert_list(path)[0].tolist() == [1]


@pytest.mark.parametrize("name", ["list.csv", "list.json", "list"])
def test_what_is_not_there_or_of_neither_format_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="not there"):
        load_expert_list(tmp_path / name)
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_expert_list(tmp_path / name)
