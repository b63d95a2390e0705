"""Turns of chat records."""

from __future__ import annotations

import math

import pytest

from configs.errors import UserError
from federated.data.chats import chat_turns, is_chat, pair_texts

ASK, TELL = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASK, TELL], "id": 3},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"conversations": [{"role": "User", "content": "Why?"}, {"role": "Assistant", "content": "So."}]},
        {"prompt": "Why?", "completion": "So."},
        {"prompt": [ASK], "completion": [TELL]},
        {"prompt": [ASK], "completion": "So."},
        {"question": "Why?", "answer": "So."},
    ],
)
def test_all_forms_are_the_same_turns(record):
    assert is_chat(record)
    assert chat_turns(record, "here") == [ASK, TELL]


def test_system_and_later_turns_are_kept_and_values_are_text_as_in_json():
    turns = [{"role": "system", "content": "Be."}, ASK, {"role": "assistant", "content": 0}, ASK]
    assert chat_turns({"messages": turns}, "here") == [
        turns[0],
        ASK,
        {"role": "assistant", "content": "0"},
        ASK,
    ]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASK]},
        {"messages": []},
        {"messages": None},
        {"messages": [ASK, {"role": "assistant", "content": "  "}]},
        {"messages": [ASK, {"role": "assistant", "content": None}]},
        {"prompt": "Why?", "completion": math.nan},
        {"question": "Why?", "answer": ""},
    ],
)
def test_without_an_answer_there_are_no_turns(record):
    assert is_chat(record) and chat_turns(record, "here") == []


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": "hello"}, "a list of turns in the column 'messages', got str in f, line 4"),
        ({"messages": ["hello"]}, "an object with role and content, got str in f, line 4, turn 1 of 'messages'"),
        ({"messages": [ASK, {"role": "bot", "content": "x"}]}, "a role among .*, got 'bot' in f, line 4, turn 2"),
        ({"messages": [{"role": None, "content": "x"}]}, "a role among .*, got None"),
        ({"messages": [{"content": "x"}]}, r"role and content \(or from and value\), got content in f, line 4, turn 1"),
        ({"messages": [{"role": "user"}]}, "got role in f, line 4, turn 1"),
        ({"messages": [{"role": "user", "content": [{"a": 1}]}]}, "got content with a list in f, line 4, turn 1"),
        ({"conversations": [{"from": "gpt", "value": {"a": 1}}]}, "got value with an object in f, line 4, turn 1"),
        ({"prompt": "x", "completion": {"a": 1}}, "got completion with an object in f, line 4"),
    ],
)  # fmt: skip
def test_malformed_chats_are_one_clear_error(record, words):
    with pytest.raises(UserError, match=words) as caught:
        chat_turns(record, "f, line 4")
    assert "\n" not in str(caught.value)


def test_other_records_are_no_chats():
    for record in ({}, {"text": "x"}, {"prompt": "x"}, {"answer": "x"}, {"question": "x", "completion": "y"}):
        assert not is_chat(record)


def test_pairs_of_texts():
    assert pair_texts({"prompt": "a", "completion": False}, "here") == ("a", "false")
    assert pair_texts({"question": "a", "answer": None}, "here") == ("a", "")
    for record in (
        {"prompt": [ASK], "completion": [TELL]},
        {"messages": [], "prompt": "a", "completion": "b"},
        {},
    ):
        assert pair_texts(record, "here") is None
