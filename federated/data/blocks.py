"""Blocks of tokens of fixed length from documents, and batches of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from configs.errors import UserError
from federated.data.answers import Document
from federated.data.token_stream import token_stream
from models.runtime.perplexity import IGNORED
from models.runtime.token_ids import check_token_ids

_NONE = torch.empty(0, 1, dtype=torch.int64)


@dataclass(frozen=True)
class Blocks:
    """N blocks of S tokens.

    ``input_ids`` and ``labels``: int64 ``[N, S]``. Labels equal the input (Hugging Face models shift them) and are -100
    at tokens without a loss: padding, which only the end of the last block may have, and all but the answers of an
    ``AnsweredText``.
    """

    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """Number of tokens with a loss; padding has none."""
        return int((self.labels != IGNORED).sum())


def pack_blocks(
    texts: Iterable[Document],
    tokenizer: Any,
    *,
    block_size: int,
    max_blocks: int | None = None,
    vocab_size: int | None = None,
) -> Blocks:
    """Concatenate BOS and the tokens of each text, and split the stream into blocks of ``block_size`` tokens.

    The last block may be partial: it is padded, or left out where it holds a single token, which has no context.
    At most ``max_blocks`` blocks are built (0 or None: all), and no more text is tokenized than they need (see
    ``token_stream``). Blocks in which no answer of an ``AnsweredText`` is predicted are left out.

    Raises :class:`UserError` as ``token_stream``, for ``texts`` without tokens or answers, or for a token id beyond the
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
    texts: Iterable[Document],
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
    stream = token_stream(texts, tokenizer)
    read = made = 0
    while not max_blocks or made < max_blocks:
        wanted = min(batch_size, max_blocks - made) if max_blocks else batch_size
        tokens = list(islice(stream, wanted * block_size))
        if not tokens:
            break
        if len(tokens) % block_size == 1 and read + len(tokens) > 1:
            tokens.pop()
        read += len(tokens)
        ids, labels = _cut(tokens, block_size) if tokens else (_NONE, _NONE)
        if vocab_size is not None:
            check_token_ids(ids, vocab_size, tokenizer)
        if len(ids):
            yield ids, labels
        made += len(ids)
    if not made:
        what = "an answer with a token to predict" if read else "text"
        raise UserError(f"expected documents with {what}, got none; check the data")


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


def _cut(stream: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    """Blocks and labels of a stream of tokens, in which those without a loss are complements."""
    missing = -len(stream) % block_size
    tokens = torch.tensor(stream, dtype=torch.int64)
    masked = tokens < 0
    tokens = torch.where(masked, ~tokens, tokens)
    # Padding is masked in the labels, so that any token of the vocabulary serves.
    input_ids = pad(tokens, (0, missing), value=int(tokens[0])).view(-1, block_size)
    labels = pad(tokens.masked_fill(masked, IGNORED), (0, missing), value=IGNORED).view(-1, block_size)
    if masked.any():
        trained = (labels[:, 1:] != IGNORED).any(1)
        return input_ids[trained], labels[trained]
    return input_ids, labels
