"""Text generation from a prompt."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UserError
from models.runtime.token_ids import check_token_ids, embedding_rows


@torch.no_grad()
def continue_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    streamer: Any = None,
) -> str:
    """Generate text after BOS and ``prompt``; all packed training documents start with BOS, too.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        prompt: text to continue; may be empty.
        max_new_tokens: most new tokens; fewer if prompt and text would exceed the model's context.
        temperature: 0 for greedy decoding.
        streamer: transformers streamer of prompt and tokens.

    Returns:
        The text after the prompt.

    Raises:
        UserError: the prompt alone fills the context, or has a token id beyond the embedding.
    """
    ids = _prompt_ids(tokenizer, prompt, model.config.max_position_embeddings).to(model.device)
    check_token_ids(ids, embedding_rows(model), tokenizer)
    room = model.config.max_position_embeddings - ids.shape[1]
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(max_new_tokens, room),
        pad_token_id=tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0,
        streamer=streamer,
        **sampling,
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, context: int) -> torch.Tensor:
    """Token ids ``[1, S]`` of BOS and prompt, with room for one more token in the context."""
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = start + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not 1 <= len(ids) < context:
        raise UserError(f"expected a prompt of 1 to {context - 1} tokens, got {len(ids)}")
    return torch.tensor([ids])
