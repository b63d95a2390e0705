"""Error type for bad user input; every command reports it in one line with exit code 2."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

_FIELD = re.compile(r"`([a-z][a-z0-9_]*)`")


class UserError(ValueError):
    """Bad user input; the message states the expected and the actual value and the remedy, in one line.

    A setting is named by its field in backquotes, e.g. ``set `n_prune```; each interface shows its own name for it.
    """


class Interrupted(Exception):
    """An interruption by the user; the message states what was saved, in one line. Every command ends with code 130."""


def name_fields(message: str, shown: Callable[[str], str]) -> str:
    """Replace every field in backquotes by ``shown(field)``, the name that an interface has for it."""
    return _FIELD.sub(lambda match: shown(match[1]), message)


def nearest(word: str, known: Iterable[str]) -> str:
    """Hint ``" (did you mean X?)"`` with the known word closest to ``word``; empty without a close one."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: BaseException) -> str:
    """Message of a library's error in one line.

    The message of ``huggingface_hub``'s ``StrictDataclassError`` is joined: its cause stands after the first line.
    The class is known by name, so that configurations need not import the library.
    """
    if any(base.__name__ == "StrictDataclassError" for base in type(error).__mro__):
        return " ".join(str(error).split())
    return (str(error).strip() or type(error).__name__).splitlines()[0]
