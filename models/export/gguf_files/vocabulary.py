"""Vocabulary of a GGUF file from a byte-level BPE tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import PreTrainedTokenizerBase

from configs.errors import UserError
from models.files.tokenizer_files import save_tokenizer

_OTHER = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# Names in llama.cpp of pre-tokenizers that split by a pattern.
_PATTERNS = {_CONTRACTIONS + _OTHER % "{1,3}": "llama-bpe", _CONTRACTIONS + _OTHER % "": "qwen2"}


def write_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Write tokens, merges, special tokens and the chat template of a tokenizer.

    Args:
        writer: writer of the file.
        tokenizer: byte-level BPE tokenizer.
        vocab_size: rows of the embedding; rows without a token get unused ones.

    Raises:
        UserError: a tokenizer of another kind.
    """
    with TemporaryDirectory(prefix="fedgraft-") as folder:
        save_tokenizer(tokenizer, Path(folder))
        path = Path(folder) / "tokenizer.json"
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(values))
        special = SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
    tokens, types = token_list(tokenizer, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name in ("bos", "eos", "unk", "pad"):  # also those that are no added tokens
        number = getattr(tokenizer, f"{name}_token_id")
        if isinstance(number, int) and number < vocab_size:
            special.special_token_ids[name] = number
    starts = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    special.add_special_token = {"bos": starts, "eos": False}
    special.add_to_gguf(writer, quiet=True)


def pre_tokenizer_name(values: dict[str, Any]) -> str:
    """Name in llama.cpp of the pre-tokenizer in the values of a ``tokenizer.json``.

    Raises:
        UserError: no byte-level BPE, or an unknown pre-tokenizer.
    """
    pre = values.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    model = values.get("model") or {}
    if model.get("type") == "BPE" and kinds[-1:] == ["ByteLevel"] and not values.get("normalizer"):
        if kinds == ["ByteLevel"] and steps[-1].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        if kinds == ["Split", "ByteLevel"] and pattern in _PATTERNS:
            return _PATTERNS[pattern]
    raise UserError(
        "expected a byte-level BPE tokenizer with a pre-tokenizer of GPT-2, SmolLM, Llama 3 or Qwen2, got "
        f"{model.get('type')} with {kinds}; export to mixtral and use the converter of llama.cpp"
    )


def token_list(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Token and type of each row of the embedding."""
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
    for token, number in tokenizer.get_vocab().items():
        if number >= vocab_size:
            continue
        tokens[number] = token
        marked = number in special or (number in added and added[number].special)
        other = TokenType.USER_DEFINED if number in added else TokenType.NORMAL
        types[number] = TokenType.CONTROL if marked else other
    return tokens, types
