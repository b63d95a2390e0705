"""Compression traces that are written and read again."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest

from configs.errors import UserError
from experts.selection.compression_trace import Averaging, CompressionTrace, Removal, Step
from experts.selection.trace_file import COLUMNS, read_trace, write_trace

STEPS = [
    Step(
        Removal(0, 2, 0),
        1,
        0.1 + 0.2,
        0.25,
        5.0,
        10.5,
        0.5,
        Removal(1, 1),
        11.0,
        Averaging(1 / 3, 0.0, "sign"),
    ),
    Step(Removal(1, 1), 2, None, None, 3.5, 10.25, -0.25),
    Step(Removal(0, 0, 1), 1, 1.0, 0.0, 1.0, 12.0, 1.75, averaging=Averaging(2e-17, 7.0, "centroid")),
]


def written(tmp_path, change=lambda rows: None):
    """The file of ``STEPS``, its rows changed."""
    path = tmp_path / "plan.csv"
    write_trace(CompressionTrace(STEPS, np.ones((2, 3)), 10.0), path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    change(rows)
    with path.open("w") as file:
        table = csv.DictWriter(file, rows[0] if rows else COLUMNS)
        table.writeheader()
        table.writerows(rows)
    return path


def test_steps_come_back_bit_for_bit_without_what_was_not_taken(tmp_path):
    expected = [replace(step, other=None, other_perplexity=None) for step in STEPS]
    assert read_trace(written(tmp_path)) == expected


def test_a_trace_without_steps_has_none(tmp_path):
    write_trace(CompressionTrace([], np.ones((1, 1)), 1.0), tmp_path / "plan.csv")
    assert read_trace(tmp_path / "plan.csv") == []


@pytest.mark.parametrize("column", ["into", "weight_into", "alignment", "decoder_layer"])
def test_a_file_without_what_a_step_needs_is_refused(tmp_path, column):
    path = written(tmp_path, lambda rows: [row.pop(column) for row in rows])
    with pytest.raises(UserError, match=f"without {column}; write it again with `fedgraft experts plan`"):
        read_trace(path)


@pytest.mark.parametrize(
    ("step", "values", "words"),
    [
        (1, {"action": "drop"}, "step 1: expected action to be 'prune' or 'merge', got 'drop'"),
        (2, {"expert": "x"}, "step 2: expected expert to be a valid integer.*got 'x'"),
        (2, {"expert": "-1"}, "step 2: expected expert to be greater than or equal to 0, got '-1'"),
        (2, {"layer": ""}, "step 2: expected layer to be a valid integer, got None"),
        (2, {"step": "4"}, "step 2: expected steps 1, 2, ... in order, got step 4"),
        (2, {"into": "0"}, "step 2: expected no into, weights and alignment beside prune"),
        (
            1,
            {"weight_expert": ""},
            "step 1: expected into, weight_into, weight_expert and alignment of a merge",
        ),
        (1, {"weight_expert": "nan"}, "step 1: expected weight_expert to be a finite number, got 'nan'"),
        (1, {"into": "2"}, "step 1: expected an expert to merge into another, got 2 into itself"),
        (3, {"into": "2"}, "step 3: expected experts that are left, got 0:2, removed before"),
        (3, {"expert": "2"}, "step 3: expected experts that are left, got 0:2"),
    ],
)
def test_a_step_that_cannot_be_executed_is_refused(tmp_path, step, values, words):
    path = written(tmp_path, lambda rows: rows[step - 1].update(values))
    with pytest.raises(UserError, match=words) as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="which cannot be read"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="which cannot be read"):
        read_trace(tmp_path / "bytes.csv")
