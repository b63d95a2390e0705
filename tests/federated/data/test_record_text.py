"""Text of records, and where their answers are."""

from __future__ import annotations

import pytest

from configs.choices import LossOn
from configs.errors import UserError
from configs.prompt_templates import load_template
from federated.data.answers import AnsweredText
from federated.data.chat_template import ChatTemplate
from federated.data.record_text import RecordForm

MESSAGES = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
PLAIN_CHAT = AnsweredText("User: Why?\n\nAssistant: So.", (23, 26))
ALPACA = {"instruction": "Why?", "output": "So."}
PAIR = {"prompt": "Why?", "completion": "So."}


def form(loss_on: str, *, named: bool = False) -> RecordForm:
    return RecordForm(load_template("plain"), named, ChatTemplate(), loss_on)


@pytest.mark.parametrize("record", [MESSAGES, PAIR, {"text": "whole"} | MESSAGES])
def test_answers_of_chats(record):
    assert form("answers").text("here", record) == PLAIN_CHAT
    text = "whole" if "text" in record else PLAIN_CHAT.text
    assert form("all").text("here", record).text == text


@pytest.mark.parametrize("record", [ALPACA, {"text": "whole"} | ALPACA])
def test_answers_of_instruction_records(record):
    assert form("answers").text("here", record) == AnsweredText("Why?\n\nSo.", (6, 9))
    assert form("all").text("here", record).text == record.get("text", "Why?\n\nSo.")


def test_a_named_prompt_template_renders_pairs_of_texts_but_no_lists_of_turns():
    assert form("answers", named=True).text("here", PAIR) == AnsweredText("Why?\n\nSo.", (6, 9))
    assert form("answers", named=True).text("here", MESSAGES) == PLAIN_CHAT


@pytest.mark.parametrize(
    "record", [{"messages": []}, {"prompt": "Why?", "completion": None}, {**ALPACA, "output": ""}]
)
@pytest.mark.parametrize("loss_on", list(LossOn))
@pytest.mark.parametrize("named", [False, True])
def test_without_an_answer_a_record_is_empty(record, loss_on, named):
    assert form(loss_on, named=named).text("here", record) == AnsweredText("", ())


def test_plain_text_has_no_answers():
    assert form("all").text("here", {"text": "a"}) == AnsweredText("a", ())
    with pytest.raises(
        UserError, match="records with answers .* got plain text in f, line 2; set loss-on to all"
    ):
        form("answers").text("f, line 2", {"text": "a"})
    for loss_on in LossOn:
        with pytest.raises(
            UserError, match="'text', or instruction.* or a chat: messages, .*got body in here"
        ):
            form(loss_on).text("here", {"body": "a"})
