"""A tokenizer with a token per byte."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(*merges: tuple[str, str], **special: str) -> PreTrainedTokenizerFast:
    """A token per byte, ids in the order of the bytes' code points in the byte-level alphabet; then those of merges."""
    alphabet = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    alphabet |= {one + other: 256 + number for number, (one, other) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
