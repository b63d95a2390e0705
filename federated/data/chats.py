"""Turns of chat records: lists of messages, ShareGPT conversations, and pairs of a question and its answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.errors import UserError, nearest
from federated.data.field_text import field_text, is_nan

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""Roles of turns, ShareGPT's among them, and their names in chat templates."""

TURN_COLUMNS = ("messages", "conversations")
PAIR_COLUMNS = (("prompt", "completion"), ("question", "answer"))
CHAT_COLUMNS = {*TURN_COLUMNS, *(column for pair in PAIR_COLUMNS for column in pair)}
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value")

Turn = dict[str, str]
"""``role`` (system, user or assistant) and ``content``, as chat templates take them."""


def is_chat(record: Mapping[str, Any]) -> bool:
    """Whether a record has the columns of a chat."""
    return any(column in record for column in TURN_COLUMNS) or _pair_of(record) is not None


def chat_turns(record: Mapping[str, Any], where: str) -> list[Turn]:
    """Turns of a record with the columns of a chat; empty without an answer, i.e. an assistant's turn with text.

    The columns are ``messages`` or ``conversations``, lists of turns with ``role`` and ``content`` or ``from`` and
    ``value``; or ``prompt`` and ``completion``, texts or such lists; or ``question`` and ``answer``.

    Args:
        record: fields of the record.
        where: location of the record, for messages.

    Raises:
        UserError: no list of turns, a turn without a role or with an unknown one, or content that is no text.
    """
    for column in TURN_COLUMNS:
        if column in record:
            return _answered(_turns(record[column], column, where))
    asked, answered = _pair_of(record) or PAIR_COLUMNS[0]
    return _answered(_side(record, asked, "user", where) + _side(record, answered, "assistant", where))


def pair_texts(record: Mapping[str, Any], where: str) -> tuple[str, str] | None:
    """Question and answer of a record that has them as two texts; None for other records.

    Raises:
        UserError: content that is no text.
    """
    pair = _pair_of(record)
    if pair is None or any(column in record for column in TURN_COLUMNS):
        return None
    if any(isinstance(record[column], list) for column in pair):
        return None
    asked, answered = (field_text(record[column], column, where) for column in pair)
    return asked, answered


def _pair_of(record: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in PAIR_COLUMNS if all(column in record for column in pair)), None)


def _answered(turns: list[Turn]) -> list[Turn]:
    answers = (turn["content"] for turn in turns if turn["role"] == "assistant")
    return turns if any(answer.strip() for answer in answers) else []


def _side(record: Mapping[str, Any], column: str, role: str, where: str) -> list[Turn]:
    value = record[column]
    if isinstance(value, list):
        return _turns(value, column, where)
    return [{"role": role, "content": field_text(value, column, where)}]


def _turns(value: Any, column: str, where: str) -> list[Turn]:
    if value is None or is_nan(value):
        return []
    if not isinstance(value, list):
        raise UserError(
            f"expected a list of turns in the column {column!r}, got {type(value).__name__} in {where}; "
            "write each turn as an object with role and content"
        )
    return [
        _turn(turn, f"{where}, turn {number} of {column!r}") for number, turn in enumerate(value, start=1)
    ]


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise UserError(f"expected an object with role and content, got {type(turn).__name__} in {where}")
    keys = [next((key for key in known if key in turn), None) for known in (_ROLE_KEYS, _TEXT_KEYS)]
    role_key, text_key = keys
    if role_key is None or text_key is None:
        came = ", ".join(map(str, turn)) or "nothing"
        raise UserError(f"expected role and content (or from and value), got {came} in {where}")
    role = turn[role_key]
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise UserError(
            f"expected a role among {', '.join(ROLES)}, got {role!r} in {where}{nearest(str(role), ROLES)}; "
            "rename the role, or remove the record"
        )
    return {"role": ROLES[role.lower()], "content": field_text(turn[text_key], text_key, where)}
