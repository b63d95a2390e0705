"""Validation of flat configurations: hyphenated keys of Flower's scalar types, each with one documented line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo

from configs.choices import check_choice
from configs.errors import UserError, nearest

Value = bool | int | float | str
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Density = Annotated[float, Field(gt=0, le=1)]


def _check_block_size(value: int) -> int:
    if value == 1:
        raise UserError("expected block-size to be at least 2, or 0 for the default, got 1")
    return value


BlockSize = Annotated[Whole, AfterValidator(_check_block_size)]


class Keys(BaseModel):
    """Base of a flat configuration: immutable, strictly typed, without unknown keys.

    Fields are snake_case in Python and hyphenated outside; the docstring of a field is its documentation.
    """

    model_config = ConfigDict(
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


K = TypeVar("K", bound=Keys)


def keys_of(schema: type[Keys]) -> list[str]:
    """The hyphenated keys of a configuration, in the order of their declaration."""
    return [str(field.alias) for field in schema.model_fields.values()]


def validate_keys(schema: type[K], values: Mapping[str, Any]) -> K:
    """Build ``schema`` from hyphenated ``values``, defaults filled in.

    Raises:
        UserError: a missing key, a wrong type, a value out of range, or a conflict between keys, in one line.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def one_of(choices: type[StrEnum]) -> AfterValidator:
    """Validator of a text key that accepts the values of an enumeration."""

    def check(value: str, info: ValidationInfo) -> str:
        check_choice(str(info.field_name).replace("_", "-"), value, choices)
        return value

    return AfterValidator(check)


def check_known(values: Iterable[str], known: Iterable[str], *, kind: str, listing: str) -> None:
    """Refuse keys outside ``known``.

    Args:
        values: keys given.
        known: keys of the schema.
        kind: noun of the key in the message, e.g. ``configuration key``.
        listing: end of the message: where the keys are listed.

    Raises:
        UserError: names the first unknown key and the nearest known one.
    """
    known = list(known)
    for key in values:
        if key not in known:
            raise UserError(f"unknown {kind} {key!r}{nearest(key, known)}; {listing}")


def integer_as_text(value: Any) -> Any:
    """Convert an integer to text, for fields whose text may be all digits (``budgets = 8``, ``out = 2024``)."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _explain(error: ValidationError) -> str:
    """One line for the first problem of a pydantic error."""
    first = error.errors()[0]
    if isinstance(cause := first.get("ctx", {}).get("error"), UserError):
        return str(cause)
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"expected a value for {key}, got none; set {key}"
    expected = first["msg"].removeprefix("Input should be ")
    if expected.startswith(("greater", "less")):
        expected = f"a value {expected}"
    return f"expected {key} to be {expected}, got {first['input']!r}"
