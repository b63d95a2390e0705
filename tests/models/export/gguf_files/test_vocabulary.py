from __future__ import annotations

import json

import gguf
import pytest
from tokenizers import Regex, pre_tokenizers

from configs.errors import UserError
from models.checkpoints.load import load_tokenizer
from models.export.gguf_files.vocabulary import (
    _PATTERNS,
    pre_tokenizer_name,
    token_list,
    write_vocabulary,
)
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.paths import ROOT

DEMO = str(ROOT / "models/demo")


def values_of(tokenizer) -> dict:
    """Values of the ``tokenizer.json`` of a fast tokenizer."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def test_known_pre_tokenizers_have_their_names():
    tokenizer = byte_tokenizer()
    assert pre_tokenizer_name(values_of(tokenizer)) == "gpt-2"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    assert pre_tokenizer_name(values_of(tokenizer)) == "smollm"
    for pattern, name in _PATTERNS.items():
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
        assert pre_tokenizer_name(values_of(tokenizer)) == name


def test_other_tokenizers_are_refused(tiny_tokenizer):
    for values in (values_of(tiny_tokenizer), {}):
        with pytest.raises(UserError, match="expected a byte-level BPE tokenizer.* converter of llama.cpp"):
            pre_tokenizer_name(values)


def test_tokens_stand_at_their_rows_and_rows_without_a_token_are_unused():
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["word"])
    tokens, types = token_list(tokenizer, 262)
    assert tokens[:256] == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert tokens[256:] == ["<s>", "</s>", "word", "[PAD259]", "[PAD260]", "[PAD261]"]
    kind = gguf.TokenType
    assert types[255:] == [kind.NORMAL, kind.CONTROL, kind.CONTROL, kind.USER_DEFINED, *[kind.UNUSED] * 3]


def test_the_vocabulary_is_read_back(tmp_path):
    tokenizer = load_tokenizer(DEMO)
    tokenizer.chat_template = None
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    write_vocabulary(writer, tokenizer, 2048)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(str(tmp_path / "x.gguf")).fields
    found = {name: field.contents() for name, field in fields.items()}
    assert found["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(2048))
    merges = values_of(tokenizer)["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert found["tokenizer.ggml.add_bos_token"] is False and found["tokenizer.ggml.pre"] == "gpt-2"
