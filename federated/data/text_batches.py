"""Token batches of data sources, for evaluation and measurement."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from configs.choices import LossOn, Split, check_choice
from configs.errors import UserError
from federated.data.answers import Document, documents_of
from federated.data.blocks import stream_blocks
from federated.data.chat_template import ChatTemplate
from federated.data.documents import absolute_sources, load_documents
from models.runtime.perplexity import IGNORED


def texts_by_domain(
    sources: Sequence[str], split: str, *, chat: ChatTemplate | None = None, loss_on: str = LossOn.ALL
) -> dict[str, list[Document]]:
    """Documents of one split of ``sources`` (see ``load_documents``) by domain.

    Raises:
        UserError: an unknown split, a split without documents, a source that cannot be read.
    """
    check_choice("`split`", split, Split)
    texts: dict[str, list[Document]] = {}
    for row in load_documents(absolute_sources(sources), chat=chat, loss_on=loss_on):
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
