"""Prompt templates, which render an instruction record (instruction, context, response) as one text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError, nearest

FOLDER = Path(__file__).parent / "templates"
DEFAULT = "alpaca"
INSTRUCTION_COLUMNS = ("instruction",)
CONTEXT_COLUMNS = ("context", "input")
RESPONSE_COLUMNS = ("response", "output")
_FORMS = {
    "with_context": {"instruction", "context", "response"},
    "without_context": {"instruction", "response"},
}
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class PromptTemplate:
    """Texts with and without a context, with placeholders ``{instruction}``, ``{context}`` and ``{response}``."""

    name: str
    with_context: str
    without_context: str

    def render(self, record: Mapping[str, Any]) -> str:
        """Text of ``record``, as of ``render_ranges``."""
        return self.render_ranges(record)[0]

    def render_ranges(self, record: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
        """Render ``record`` (instruction, context or input, response or output) as one text.

        A context that is missing or blank selects the text without one.

        Returns:
            The text, and start and end of each response in it, in characters.

        Raises:
            UserError: a record without an instruction or a response.
        """
        fields = {
            "instruction": _first(record, INSTRUCTION_COLUMNS),
            "context": _first(record, CONTEXT_COLUMNS),
            "response": _first(record, RESPONSE_COLUMNS),
        }
        if not takes(record):
            raise UserError(f"expected instruction[, context], response, got the columns {', '.join(record)}")
        form = self.with_context if fields["context"] else self.without_context
        # One pass over the template, so that braces inside a record stay as they are.
        text, ranges, done = "", [], 0
        for match in _PLACEHOLDER.finditer(form):
            text += form[done : match.start()]
            if match[1] == "response":
                ranges += [len(text), len(text) + len(fields["response"])]
            text += fields[match[1]]
            done = match.end()
        return text + form[done:], tuple(ranges)


def takes(record: Mapping[str, Any]) -> bool:
    """Whether ``record`` has the columns that a template needs."""
    return any(name in record for name in INSTRUCTION_COLUMNS) and any(
        name in record for name in RESPONSE_COLUMNS
    )


def template_names() -> list[str]:
    """Names of the built-in templates."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_template(name: str = "auto") -> PromptTemplate:
    """Load a template by name, by the path of a JSON file, or the default one for ``auto``.

    Raises:
        UserError: no such template, or a file that lacks a text or has other placeholders.
    """
    known = template_names()
    name = DEFAULT if name == "auto" else name
    path = FOLDER / f"{name}.json" if name in known else Path(name)
    if path.suffix != ".json" or not path.is_file():
        choices = f"auto, {', '.join(known)} or a JSON file"
        raise UserError(f"expected template to be {choices}, got {name!r}{nearest(name, known)}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"expected JSON in the template {str(path)!r}, got: {error}") from None
    return PromptTemplate(path.stem, **{form: _form(values, form, path) for form in _FORMS})


def _form(values: Any, form: str, path: Path) -> str:
    text = values.get(form) if isinstance(values, dict) else None
    if not isinstance(text, str) or set(_PLACEHOLDER.findall(text)) != _FORMS[form]:
        wanted = ", ".join(f"{{{field}}}" for field in sorted(_FORMS[form]))
        raise UserError(
            f"expected the template {str(path)!r} to hold a text {form!r} with {wanted}; fix the file"
        )
    return text


def _first(record: Mapping[str, Any], columns: tuple[str, ...]) -> str:
    """The stripped text of the first of ``columns`` that is not empty."""
    for column in columns:
        if text := str(record.get(column) or "").strip():
            return text
    return ""
