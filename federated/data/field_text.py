"""Text of a field of a record: strings as they are, numbers and booleans in their JSON form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from configs.errors import UserError


def is_nan(value: Any) -> bool:
    """Whether a value is the float NaN, which tables write for a missing cell."""
    return isinstance(value, float) and value != value


def field_text(value: Any, column: str, where: str) -> str:
    """Text of a field: 0 is ``0``, false is ``false``; a missing value (null, NaN) is empty.

    Args:
        value: value of the field.
        column: name of the field, for the message.
        where: location of the record, for the message.

    Raises:
        UserError: a list, an object or binary data.
    """
    if value is None or is_nan(value):
        return ""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, Mapping | list | tuple | bytes):
        kind = (
            "an object" if isinstance(value, Mapping) else "bytes" if isinstance(value, bytes) else "a list"
        )
        raise UserError(
            f"expected a string, a number or a boolean in the column {column!r}, got {column} with {kind} "
            f"in {where}; convert it to text"
        )
    return storable_text(str(value))


def storable_text(text: str) -> str:
    """The text without lone surrogates, which Arrow cannot store."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def text_fields(record: Mapping[str, Any], columns: tuple[str, ...], where: str) -> dict[str, str]:
    """Text of those of ``columns`` that a record has (see ``field_text``)."""
    return {column: field_text(record[column], column, where) for column in columns if column in record}
