"""Generator of ``configs/default.toml``: every key of a run with its documentation and its default."""

from __future__ import annotations

from configs.keys import Value
from configs.schema import RunConfig


def defaults_toml() -> str:
    """The text of ``configs/default.toml``: per key its line of documentation and its default."""
    lines = [
        "# Every key of a run with its default. Generated from configs/schema.py: `defaults_toml()`.",
        "",
    ]
    for field in RunConfig.model_fields.values():
        lines += [f"# {field.description}", f"{field.alias} = {_toml(field.default)}", ""]
    return "\n".join(lines)


def _toml(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)
