"""Text from a model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UserError


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
    """Continue ``prompt`` after a BOS token, which every document that FedGraft packs starts with.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        prompt: text to continue; may be empty.
        max_new_tokens: at most; cut so that prompt and text fit the model's context.
        temperature: 0 for greedy decoding.
        streamer: a transformers streamer that receives prompt and tokens as they come.

    Returns:
        The text after the prompt.

    Raises:
        UserError: the prompt alone fills the context.
    """
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = torch.tensor(
        [start + tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=model.device
    )
    room = model.config.max_position_embeddings - ids.shape[1]
    if room < 1 or not ids.numel():
        raise UserError(
            f"expected a prompt of 1 to {model.config.max_position_embeddings - 1} tokens, got {ids.shape[1]}"
        )
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
