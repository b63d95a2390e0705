"""Text of a record: its own, that of a prompt template, or that of a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.choices import LossOn
from configs.errors import UserError
from configs.prompt_templates import (
    CONTEXT_COLUMNS,
    INSTRUCTION_COLUMNS,
    RESPONSE_COLUMNS,
    PromptTemplate,
    takes,
)
from federated.data.answers import AnsweredText
from federated.data.chat_template import ChatTemplate
from federated.data.chats import chat_turns, is_chat, pair_texts
from federated.data.field_text import field_text, is_nan, text_fields

_EMPTY = AnsweredText("", ())


@dataclass(frozen=True)
class RecordForm:
    """Form of the text of records.

    Attributes:
        prompt: template of instruction records, and of questions with answers where it is named.
        named: whether the prompt template is named: it precedes a record's own text then.
        chat: template of chats.
        loss_on: tokens with a loss; with answers only, a record's answers precede its own text.
    """

    prompt: PromptTemplate
    named: bool
    chat: ChatTemplate
    loss_on: str = LossOn.ALL

    def text(self, where: str, record: Mapping[str, Any]) -> AnsweredText:
        """Text of a record, with the ranges of its answers; empty without text or, where it is rendered, an answer.

        Args:
            where: location of the record, for messages.
            record: fields of the record.

        Raises:
            UserError: no columns of text, fields that are no text, or no answers where the loss is on these only.
        """
        only_answers = self.loss_on == LossOn.ANSWERS
        if takes(record) and (self.named or only_answers or "text" not in record):
            return self._instruction(where, record)
        if is_chat(record) and (self.named or only_answers or "text" not in record):
            return self._chat(where, record)
        if only_answers and "text" in record:
            raise UserError(
                f"expected records with answers where the loss is on answers only, got plain text in {where}; "
                "set loss-on to all, or leave the source out"
            )
        return AnsweredText(_own_text(where, record), ())

    def _instruction(self, where: str, record: Mapping[str, Any]) -> AnsweredText:
        fields = text_fields(record, INSTRUCTION_COLUMNS + CONTEXT_COLUMNS + RESPONSE_COLUMNS, where)
        if not any(fields.get(column, "").strip() for column in RESPONSE_COLUMNS):
            return _EMPTY
        return AnsweredText(*self.prompt.render_ranges(fields))

    def _chat(self, where: str, record: Mapping[str, Any]) -> AnsweredText:
        pair = pair_texts(record, where) if self.named else None
        if pair is not None:
            return self._instruction(where, {"instruction": pair[0], "response": pair[1]})
        turns = chat_turns(record, where)
        return self.chat.render(turns, where, answers=self.loss_on == LossOn.ANSWERS) if turns else _EMPTY


def _own_text(where: str, record: Mapping[str, Any]) -> str:
    if "text" not in record:
        came = ", ".join(record) or "no columns"
        wanted = (
            "'text', or instruction[, context], response (or instruction[, input], output), or a chat: messages, "
            "conversations, prompt and completion, or question and answer"
        )
        raise UserError(f"expected the columns {wanted}, got {came} in {where}")
    if is_nan(record["text"]):
        raise UserError(
            f"expected text in the column 'text', got NaN in {where}; fill it or remove the record"
        )
    return field_text(record["text"], "text", where)
