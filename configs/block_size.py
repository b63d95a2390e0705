"""Number of tokens per block, from what is asked for and the model's context."""

from __future__ import annotations

from typing import Any

from configs.errors import UserError

DEFAULT_BLOCK_SIZE = 256


def context_length(config: Any) -> int | None:
    """Tokens of context of a model, from its Hugging Face configuration; None where it states no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def choose_block_size(block_size: int | None, context: int | None) -> int:
    """Tokens per block: ``block_size``, else the smaller of ``DEFAULT_BLOCK_SIZE`` and the context.

    Args:
        block_size: tokens asked for; 0 or None: the default.
        context: tokens of context of the model; None: no limit.

    Raises:
        UserError: ``block_size`` above the context.
    """
    if not block_size:
        return min(DEFAULT_BLOCK_SIZE, context or DEFAULT_BLOCK_SIZE)
    if context is not None and block_size > context:
        raise UserError(
            f"expected block-size to be at most the model's max_position_embeddings {context}, got {block_size}; "
            "lower it, or leave it out"
        )
    return block_size
