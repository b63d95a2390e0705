"""Documents whose loss is on their answers only: a text with the character ranges of its answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

RANGES = "answer ranges"
"""Column of a dataset of documents with the ranges of ``AnsweredText``; absent where the loss is on all tokens."""


@dataclass(frozen=True)
class AnsweredText:
    """A document whose loss is on its answers only.

    Attributes:
        text: whole text.
        ranges: start and end of each answer in characters, flat and ascending: ``(start, end, start, end, ...)``.
    """

    text: str
    ranges: tuple[int, ...]


Document = str | AnsweredText
"""A document: its text where the loss is on all tokens."""


def document_text(document: Document) -> str:
    """Whole text of a document."""
    return document if isinstance(document, str) else document.text


def documents_of(rows: Iterable[Mapping[str, Any]]) -> list[Document]:
    """Documents of the rows of a dataset of documents (see ``load_documents``)."""
    return [AnsweredText(row["text"], tuple(row[RANGES])) if RANGES in row else row["text"] for row in rows]


def answer_mask(offsets: Tensor, ranges: Sequence[int]) -> Tensor:
    """Mask ``[N]`` bool of the tokens that are part of an answer: from the first to the last that overlaps its range.

    Args:
        offsets: start and end of each token in characters, ``[N, 2]``, ascending.
        ranges: start and end of each answer in characters (see ``AnsweredText``).
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    mask = starts.new_zeros(len(offsets)).bool()
    for start, end in zip(ranges[::2], ranges[1::2], strict=True):
        inside = ((starts < end) & (ends > start)).nonzero()
        if len(inside):
            mask[int(inside[0]) : int(inside[-1]) + 1] = True
    return mask
