"""Tokens of documents one after the other, long documents in pieces, so that no more is tokenized than is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from configs.errors import UserError
from federated.data.answers import AnsweredText, Document, answer_mask, document_text

DOCUMENTS_AT_ONCE = 256
CHARACTERS_AT_ONCE = 2**17
# A space between letters starts a word in every common tokenizer, so that the tokens before it do not depend on it.
_WORD_START = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
_SEARCHED = 4096  # characters before the end of a piece that are searched for a word
_CONTEXT = 64  # characters before a piece that are tokenized with it, and whose tokens are left out


def token_stream(documents: Iterable[Document], tokenizer: Any) -> Iterator[int]:
    """Tokens of all documents, each document preceded by BOS; a token without a loss as its complement, ``~token``.

    Without BOS the tokenizer's EOS is used. Documents without tokens are left out. At most ``DOCUMENTS_AT_ONCE``
    documents or ``CHARACTERS_AT_ONCE`` characters are tokenized before the first of their tokens is read; a longer
    document is cut at words, which leaves its tokens as they are.

    Raises:
        UserError: a tokenizer without BOS and EOS; answers, with a tokenizer that does not locate its tokens.
    """
    start = _start_token(tokenizer)
    for group in _groups(documents):
        for document, pieces in zip(group, _pieces_of(group, tokenizer), strict=True):
            started = False
            for tokens in filter(None, pieces):
                if not started:
                    yield start if isinstance(document, str) else ~start
                    started = True
                yield from tokens


def _start_token(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError(
        "expected a tokenizer with a BOS or an EOS token, got neither; set bos_token in the tokenizer"
    )


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents that are tokenized at once; a long document is a group by itself."""
    group: list[Document] = []
    characters = 0
    for document in documents:
        length = len(document_text(document))
        if group and (characters + length > CHARACTERS_AT_ONCE or len(group) == DOCUMENTS_AT_ONCE):
            yield group
            group, characters = [], 0
        group.append(document)
        characters += length
    if group:
        yield group


def _pieces_of(group: list[Document], tokenizer: Any) -> list[Iterable[list[int]]]:
    """Tokens of each document of a group in pieces: one, but of a long document."""
    if len(group) == 1 and len(document_text(group[0])) > CHARACTERS_AT_ONCE:
        return [_long_pieces(group[0], tokenizer)]
    return [[tokens] for tokens in _tokens_of(group, tokenizer)]


def _tokens_of(group: list[Document], tokenizer: Any) -> list[list[int]]:
    """Tokens of each document of a group, those without a loss as their complement."""
    located = any(isinstance(document, AnsweredText) for document in group)
    encoded = _encode([document_text(document) for document in group], tokenizer, located=located)
    if not located:
        return encoded["input_ids"]
    parts = zip(group, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [_masked(document, ids, torch.tensor(offsets).view(-1, 2)) for document, ids, offsets in parts]


def _masked(document: Document, ids: list[int], offsets: torch.Tensor) -> list[int]:
    if isinstance(document, str):
        return ids
    mask = answer_mask(offsets, document.ranges).tolist()
    return [token if answered else ~token for token, answered in zip(ids, mask, strict=True)]


def _long_pieces(document: Document, tokenizer: Any) -> Iterator[list[int]]:
    """Tokens of the pieces of a long document, each tokenized when it is read."""
    text = document_text(document)
    if not tokenizer.is_fast:  # the tokens of the context cannot be told from those of the piece
        yield from _tokens_of([document], tokenizer)
        return
    at = context = 0
    while at < len(text):
        end, at_word = _piece_end(text, at)
        (encoded,) = [_encode([text[at - context : end]], tokenizer, located=True)]
        offsets = torch.tensor(encoded["offset_mapping"][0]).view(-1, 2) + (at - context)
        kept = (offsets[:, 0] >= at).nonzero().flatten()
        skipped = int(kept[0]) if len(kept) else len(offsets)
        yield _masked(document, encoded["input_ids"][0][skipped:], offsets[skipped:])
        at, context = end, _CONTEXT if at_word else 0


def _piece_end(text: str, at: int) -> tuple[int, bool]:
    """End of the piece that starts ``at``, and whether a word starts there."""
    end = at + CHARACTERS_AT_ONCE
    if end >= len(text):
        return len(text), False
    window = max(at + CHARACTERS_AT_ONCE // 2, end - _SEARCHED)
    words = [match.start() for match in _WORD_START.finditer(text, window, end)]
    return (words[-1], True) if words else (end, False)


def _encode(texts: list[str], tokenizer: Any, *, located: bool) -> Any:
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if located:
        if not tokenizer.is_fast:
            raise UserError(
                "expected a fast tokenizer (tokenizer.json) where the loss is on answers only, got one without; "
                "set loss-on to all, or convert the tokenizer"
            )
        options["return_offsets_mapping"] = True
    return tokenizer(texts, **options)
