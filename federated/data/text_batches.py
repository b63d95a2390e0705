"""Text of data sources as batches of tokens, for whoever looks into a model and does not train it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from configs.errors import UserError
from federated.data.blocks import stream_blocks
from federated.data.documents import absolute_sources, load_documents
from models.runtime.perplexity import IGNORED

SPLITS = ("valid", "train", "all")


def texts_by_domain(sources: Sequence[str], split: str) -> dict[str, list[str]]:
    """Documents of one split of ``sources`` (see ``load_documents``), by domain.

    Raises:
        UserError: an unknown split, a source that cannot be read.
    """
    if split not in SPLITS:
        raise UserError(f"expected --split {', '.join(SPLITS[:-1])} or {SPLITS[-1]}, got {split!r}")
    texts: dict[str, list[str]] = {}
    for row in load_documents(absolute_sources(sources)):
        if split in ("all", row["split"]):
            texts.setdefault(row["domain"], []).append(row["text"])
    return texts


def text_batches(
    domains: Iterable[Iterable[str]],
    tokenizer: Any,
    *,
    block_size: int,
    batch_size: int,
    max_blocks: int | None,
    max_position_embeddings: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches ``(input_ids [B, S], counted [B, S] bool)`` of the documents, one domain after the other.

    Args:
        domains: texts of each.
        tokenizer: of the model.
        block_size: tokens of a block, S.
        batch_size: blocks of a batch, at most.
        max_blocks: of a domain; 0 or None for all.
        max_position_embeddings: of the model, which no block exceeds.

    Raises:
        UserError: blocks longer than the model allows, or a domain without text.
    """
    for texts in domains:
        for input_ids, labels in stream_blocks(
            texts,
            tokenizer,
            block_size=block_size,
            batch_size=batch_size,
            max_blocks=max_blocks,
            max_position_embeddings=max_position_embeddings,
        ):
            yield input_ids, labels != IGNORED
