"""Blocks of tokens of fixed length from documents, and batches of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from models.runtime.perplexity import IGNORED
from models.runtime.token_ids import check_token_ids

_DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class Blocks:
    """N blocks of S tokens.

    ``input_ids`` and ``labels``: int64 ``[N, S]``. Labels equal the input (Hugging Face models shift them) and are -100
    at padding, which only the end of the last block may have.
    """

    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """Number of tokens without padding."""
        return int((self.labels != IGNORED).sum())


def pack_blocks(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    block_size: int,
    max_blocks: int | None = None,
    vocab_size: int | None = None,
) -> Blocks:
    """Concatenate BOS and the tokens of each text, and split the stream into blocks of ``block_size`` tokens.

    The last block may be partial: it is padded, or left out where it holds a single token, which has no context.
    At most ``max_blocks`` blocks are built (0 or None: all), and no more text is tokenized than they need. A tokenizer
    without BOS uses its EOS.

    Raises :class:`UserError` for a tokenizer without BOS and EOS, ``texts`` without tokens, or a token id beyond the
    ``vocab_size`` rows of the model's embedding.
    """
    parts = list(
        stream_blocks(
            texts,
            tokenizer,
            block_size=block_size,
            max_blocks=max_blocks,
            vocab_size=vocab_size,
        )
    )
    input_ids, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Blocks(input_ids, labels)


def stream_blocks(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    block_size: int,
    batch_size: int = 1024,
    max_blocks: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of ``pack_blocks`` in batches of at most ``batch_size``: ``(input_ids, labels)``, ``[B, S]`` each.

    Raises :class:`UserError` at the first batch, as ``pack_blocks`` does.
    """
    wanted = max_blocks * block_size if max_blocks else None
    stream = islice(_token_stream(texts, tokenizer, _start_token(tokenizer)), wanted)
    made = 0
    while tokens := list(islice(stream, batch_size * block_size)):
        if len(tokens) % block_size == 1 and made + len(tokens) > 1:
            tokens.pop()
        if tokens:
            ids, labels = _cut(tokens, block_size)
            if vocab_size is not None:
                check_token_ids(ids, vocab_size, tokenizer)
            yield ids, labels
        made += len(tokens)
    if not made:
        raise UserError("expected documents with text, got none; check the data")


def take(blocks: Blocks, n: int) -> Blocks:
    """The first ``n`` blocks; all for 0 or more than there are."""
    end = n or len(blocks)
    return Blocks(blocks.input_ids[:end], blocks.labels[:end])


def batches(
    blocks: Blocks, batch_size: int, *, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches ``(input_ids [B, S], labels [B, S])``: every block once per epoch, shuffled by ``generator``.

    The last batch of an epoch may be smaller than ``batch_size``. :class:`UserError` without blocks.
    """
    if not len(blocks):
        raise UserError("expected at least one block to train on, got none; check the data")
    return _batches(blocks, batch_size, generator)


def _batches(blocks: Blocks, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for chosen in torch.randperm(len(blocks), generator=generator).split(batch_size):
            yield blocks.input_ids[chosen], blocks.labels[chosen]


def _token_stream(texts: Iterable[str], tokenizer: Any, start: int) -> Iterator[int]:
    """Tokens of all documents, each preceded by ``start``; documents without tokens are left out."""
    remaining = iter(texts)
    while group := list(islice(remaining, _DOCUMENTS_AT_ONCE)):
        encoded = tokenizer(group, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for tokens in encoded["input_ids"]:
            if tokens:
                yield start
                yield from tokens


def _start_token(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError(
        "expected a tokenizer with a BOS or an EOS token, got neither; set bos_token in the tokenizer"
    )


def _cut(stream: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    missing = -len(stream) % block_size
    tokens = torch.tensor(stream, dtype=torch.int64)
    # Padding is masked in the labels, so that any token of the vocabulary serves.
    input_ids = torch.nn.functional.pad(tokens, (0, missing), value=stream[0]).view(-1, block_size)
    labels = torch.nn.functional.pad(tokens, (0, missing), value=IGNORED).view(-1, block_size)
    return input_ids, labels
