"""Token batches of data sources, for evaluation and measurement."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.choices import LossOn, Split, check_choice
from configs.errors import UserError
from federated.data.answers import Document, documents_of
from federated.data.blocks import Blocks, pack_blocks, stream_blocks
from federated.data.chat_template import ChatTemplate
from federated.data.documents import WIKIMIX_DOCUMENTS, absolute_sources, load_documents
from models.runtime.perplexity import IGNORED


def texts_by_domain(
    sources: Sequence[str],
    split: str,
    *,
    chat: ChatTemplate | None = None,
    loss_on: str = LossOn.ALL,
    wikimix_documents: int = WIKIMIX_DOCUMENTS,
) -> dict[str, list[Document]]:
    """Documents of one split of ``sources`` by domain; the other arguments are those of ``load_documents``.

    Raises:
        UserError: an unknown split, a split without documents, a source that cannot be read.
    """
    check_choice("`split`", split, Split)
    texts: dict[str, list[Document]] = {}
    for row in load_documents(
        absolute_sources(sources), chat=chat, loss_on=loss_on, wikimix_documents=wikimix_documents
    ):
        members = texts.setdefault(row["domain"], [])
        if split in ("all", row["split"]):
            members += documents_of([row])
    empty = [domain for domain, members in texts.items() if not members]
    if len(empty) == len(texts):
        raise UserError(
            f"expected documents in the {split} split of {', '.join(sources)}, got none; add a file with "
            f"'{split}' in its name, or use the split {'train' if split == 'valid' else 'valid'} or all"
        )
    if empty:
        warnings.warn(
            f"no documents in the {split} split of {', '.join(empty)}: these domains are left out",
            stacklevel=2,
        )
    return {domain: members for domain, members in texts.items() if members}


def text_batches(
    domains: Iterable[Iterable[Document]],
    tokenizer: Any,
    *,
    block_size: int,
    batch_size: int,
    max_blocks: int | None,
    vocab_size: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches ``(input_ids [B, S], token_mask [B, S] bool)`` of the documents, one domain after the other.

    Args:
        domains: texts of each domain.
        tokenizer: tokenizer of the model.
        block_size: tokens per block, S.
        batch_size: most blocks per batch.
        max_blocks: blocks per domain; 0 or None: all.
        vocab_size: rows of the model's embedding; None: token ids are not checked.

    Raises:
        UserError: a token id beyond the embedding, or a domain without text.
    """
    for texts in domains:
        for input_ids, labels in stream_blocks(
            texts,
            tokenizer,
            block_size=block_size,
            batch_size=batch_size,
            max_blocks=max_blocks,
            vocab_size=vocab_size,
        ):
            yield input_ids, labels != IGNORED


def even_blocks(
    domains: Sequence[Iterable[Document]],
    tokenizer: Any,
    *,
    blocks: int,
    block_size: int,
    max_blocks: int = 0,
    vocab_size: int | None = None,
) -> Blocks:
    """Blocks of all domains, as many from each as long as its text lasts.

    Args:
        domains: texts of each domain.
        tokenizer: tokenizer of the model.
        blocks: blocks of all domains together, rounded up to the same number for each; 0: all.
        block_size: tokens per block, S.
        max_blocks: most blocks per domain; 0: no limit.
        vocab_size: rows of the model's embedding; None: token ids are not checked.

    Raises:
        UserError: as ``pack_blocks``.
    """
    limits = [limit for limit in (-(-blocks // len(domains)), max_blocks) if limit]
    packed = [
        pack_blocks(
            texts,
            tokenizer,
            block_size=block_size,
            max_blocks=min(limits, default=0),
            vocab_size=vocab_size,
        )
        for texts in domains
    ]
    return Blocks(*(torch.cat(each) for each in zip(*((b.input_ids, b.labels) for b in packed), strict=True)))
