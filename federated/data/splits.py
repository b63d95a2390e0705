"""Train and valid splits of documents: split words in names, and held-out documents where there are none."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

HELD_OUT = 0.1
WORDS = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words that name a split, in files, folders, splits of a hub dataset and the column ``split`` of records."""

_SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLIT_OF)})(?:set|split|data)?(?![a-z])")


def split_word(*names: Any) -> str:
    """Split named by the last split word of the first name that has one; ``""`` without.

    Words are delimited by anything but letters: ``train-0`` and ``local_training_3``, but neither ``latest`` nor
    ``value``.

    Args:
        names: names from the most to the least specific, e.g. of a file and of its folders; other values than strings
            have no word.

    Returns:
        ``train``, ``valid``, ``test`` or ``""``.
    """
    for name in names:
        if isinstance(name, str) and (words := _WORD.findall(name.lower())):
            return _SPLIT_OF[words[-1]]
    return ""


def assign_splits(words: Sequence[str]) -> list[str | None]:
    """Split of each part of a source from its split word (see ``split_word``).

    ``test`` is held out where no part is ``valid``. Without a training and a held-out part the source is one whole.

    Returns:
        per part ``train`` or ``valid``, or None where the part is left out; ``""`` for all parts of a whole.
    """
    held_out = "valid" if "valid" in words else "test"
    if "train" not in words or held_out not in words:
        return [""] * len(words)
    splits = {"train": "train", held_out: "valid"}
    return [splits.get(word) for word in words]


def hold_out(rows: Iterable[dict[str, Any]]) -> None:
    """Set ``split`` to ``valid`` in the last 10 % of each domain (at least one of two), to ``train`` in the others."""
    by_domain = defaultdict(list)
    for row in rows:
        by_domain[row["domain"]].append(row)
    for members in by_domain.values():
        kept = len(members) - held_out_count(len(members))
        for position, row in enumerate(members):
            row["split"] = "train" if position < kept else "valid"


def held_out_count(documents: int) -> int:
    """Number of held-out documents: 10 %, at least one, but never the only one."""
    return min(max(1, int(documents * HELD_OUT)), max(0, documents - 1))
