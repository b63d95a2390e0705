"""A checkpoint that its configuration calls tied and whose weights hold an output head of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tests.conftest import tiny_llama


def save_with_own_head(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Save the tied ``tiny_llama`` and add an output head of other values to its weights; returns ``folder``."""
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    add_head(folder)
    return folder


def add_head(folder: Path) -> None:
    """Add ``own_head`` to the weights of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    head = own_head().to(tensors["model.embed_tokens.weight"].dtype)
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})


def own_head() -> Tensor:
    """The added output head ``[64, 32]``."""
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) / 4


@torch.no_grad()
def own_head_logits(ids: Tensor) -> Tensor:
    """Logits of the tiny Llama with ``own_head``, by the hidden states of its tied model."""
    return tiny_llama(tie_word_embeddings=True).model(input_ids=ids).last_hidden_state @ own_head().T
