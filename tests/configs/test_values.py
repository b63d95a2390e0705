from __future__ import annotations

import pytest

from configs.errors import UserError
from configs.values import parse_assignments, parse_budgets, parse_partition, read_config_file, split_list


def test_assignments_follow_toml_and_fall_back_to_text():
    assert parse_assignments(
        [
            "a=1",
            "b=16,8",
            "c=[1, 2]",
            "d=top",
            "e=true",
            "f=",
            " g = 1.5 ",
            'h="a b"',
            "i=2024-01-01",
            "j=a=b",
            "k=1e-3",
        ]
    ) == {
        "a": 1,
        "b": "16,8",
        "c": [1, 2],
        "d": "top",
        "e": True,
        "f": "",
        "g": 1.5,
        "h": "a b",
        "i": "2024-01-01",
        "j": "a=b",
        "k": 1e-3,
    }


def test_a_value_cannot_smuggle_in_another_key_and_the_last_one_wins():
    assert parse_assignments(["a=1\nb=2"]) == {"a": "1\nb=2"}
    assert parse_assignments(["a=1", "a=2"]) == {"a": 2}


@pytest.mark.parametrize("text", ["seed", "=3", 'out="abc', "budgets=[1,2"])
def test_malformed_assignments(text):
    with pytest.raises(UserError, match="expected"):
        parse_assignments([text])


def test_read_config_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('num-rounds = 3\ndata = "wikimix"\n')
    assert read_config_file(path) == {"num-rounds": 3, "data": "wikimix"}


@pytest.mark.parametrize(
    ("content", "message"), [(b"a = 1\nb = = 2\n", "at line 2"), (b"a = '\xff'", "utf-8")]
)
def test_malformed_config_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_config_file(path)
    assert "run.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_config_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_config_file(tmp_path / "none.toml")
    with pytest.raises(UserError, match="directory"):
        read_config_file(tmp_path)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("domain", ("domain", "")),
        ("iid", ("iid", "")),
        ("dirichlet:0.5", ("dirichlet", "0.5")),
        ("natural:meta.source:id", ("natural", "meta.source:id")),
    ],
)
def test_partitions(text, parts):
    assert parse_partition(text) == parts


@pytest.mark.parametrize(
    "text",
    ["", "iid:3", "natural", "natural:", "dirichlet", "dirichlet:0", "dirichlet:x", "dirichlet:inf", "idd"],
)
def test_malformed_partitions(text):
    with pytest.raises(UserError, match="expected"):
        parse_partition(text)


def test_budgets_and_lists():
    assert parse_budgets(" 16, 8,1") == (16, 8, 1) and parse_budgets("") == ()
    for text in ("-1", "1.5", "a", "8;4"):
        with pytest.raises(UserError, match="whole numbers"):
            parse_budgets(text)
    assert split_list(" a ;; b;", ";") == ("a", "b")
