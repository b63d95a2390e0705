"""Check of token ids against the rows of a model's embedding."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.errors import UserError


def check_token_ids(ids: Tensor, vocab_size: int, tokenizer: Any = None) -> None:
    """Check that every token id has a row in the embedding.

    Args:
        ids: token ids of any shape, from 0.
        vocab_size: rows of the embedding.
        tokenizer: names the token in the message; None: its id alone.

    Raises:
        UserError: names the largest id beyond the embedding and its token.
    """
    largest = int(ids.max()) if ids.numel() else -1
    if largest < vocab_size:
        return
    token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(largest)!r})"
    raise UserError(
        f"expected token ids below {vocab_size}, the rows of the model's embedding, got {largest}{token}; the "
        "tokenizer is larger than the embedding: use the model's own, or add rows with `model.resize_token_embeddings`"
    )


def may_exceed(tokenizer: Any, vocab_size: int) -> bool:
    """Whether the tokenizer has a token id beyond the ``vocab_size`` rows of an embedding."""
    return max(tokenizer.get_vocab().values(), default=-1) >= vocab_size


def embedding_rows(model: PreTrainedModel) -> int:
    """Number of token ids that the model's embedding holds."""
    return len(cast(nn.Embedding, model.get_input_embeddings()).weight)
