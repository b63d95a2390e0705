from __future__ import annotations

import math

import pytest

from configs.errors import UserError
from federated.data.field_text import field_text, text_fields


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a b", "a b"),
        ("", ""),
        (None, ""),
        (math.nan, ""),
        (0, "0"),
        (-7, "-7"),
        (0.0, "0.0"),
        (1.5, "1.5"),
        (False, "false"),
        (True, "true"),
        ("NaN", "NaN"),
    ],
)
def test_values_as_text(value, text):
    assert field_text(value, "output", "a.jsonl, line 1") == text


@pytest.mark.parametrize(
    ("value", "kind"), [(["yes"], "a list"), ([], "a list"), ({"a": 1}, "an object"), (b"x", "bytes")]
)
def test_what_is_no_text_names_column_and_line(value, kind):
    with pytest.raises(UserError, match=f"column 'output', got output with {kind} in a.jsonl, line 3;"):
        field_text(value, "output", "a.jsonl, line 3")


def test_only_the_named_columns_are_read():
    assert text_fields({"a": 0, "b": ["x"], "c": None}, ("a", "c", "d"), "") == {"a": "0", "c": ""}
