from __future__ import annotations

import json
import warnings

import pytest

from configs.errors import UserError
from experts.versioned_json import read_versioned_json


def read(path):
    return read_versioned_json(path, what="a thing", version="1.0")


def test_the_expected_version_is_read_without_a_word(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": "1.0", "x": 1}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(path) == {"version": "1.0", "x": 1}


@pytest.mark.parametrize(
    "value, words",
    [({"version": "2.0"}, "version '2.0'"), ({"version": 1}, "version 1;"), ({}, "no version")],
)
def test_another_version_is_warned_of_and_read(tmp_path, value, words):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value))
    with pytest.warns(UserWarning, match=f"a.json has {words}.*'1.0'"):
        assert read(path) == value


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="a thing in JSON.*a.json"):
        read(path)


def test_what_is_no_object_or_not_there_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(UserError, match="a list"):
        read(tmp_path / "a.json")
    with pytest.raises(UserError, match="b.json, which is not there"):
        read(tmp_path / "b.json")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)
