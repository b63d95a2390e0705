"""Tokens of documents, long ones in pieces."""

from __future__ import annotations

from itertools import islice

import pytest
from transformers import AutoTokenizer

from configs.errors import UserError
from federated.data import token_stream as module
from federated.data.answers import AnsweredText
from federated.data.blocks import pack_blocks
from federated.data.token_stream import CHARACTERS_AT_ONCE, DOCUMENTS_AT_ONCE, token_stream
from tests.conftest import shared_path
from tests.support.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer(bos_token="<s>", eos_token="</s>")
BOS = TOKENIZER.bos_token_id


class Counting:
    """A tokenizer that counts the characters and the documents that it is given."""

    def __init__(self, tokenizer=TOKENIZER) -> None:
        self.tokenizer, self.characters, self.documents = tokenizer, 0, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, **options):
        self.characters += sum(map(len, texts))
        self.documents += len(texts)
        return self.tokenizer(texts, **options)


def words(characters: int) -> str:
    return ("word other " * (characters // 11 + 1))[:characters]


def test_of_one_huge_document_a_piece_is_tokenized():
    counting = Counting()
    blocks = pack_blocks([words(15_000_000)], counting, block_size=256, max_blocks=2)
    assert len(blocks) == 2 and counting.characters <= CHARACTERS_AT_ONCE


def test_of_many_documents_a_group_is_tokenized():
    for size in (100, 40_000):
        counting = Counting()
        assert len(list(islice(token_stream([words(size)] * 1000, counting), 50))) == 50
        assert counting.characters <= CHARACTERS_AT_ONCE and counting.documents <= DOCUMENTS_AT_ONCE


def test_every_character_of_a_long_document_is_tokenized_once_but_for_the_context():
    text, counting = words(3 * CHARACTERS_AT_ONCE), Counting()
    tokens = list(token_stream(["a", text, "b"], counting))
    expected = [BOS, *TOKENIZER.encode("a"), BOS, *TOKENIZER.encode(text), BOS, *TOKENIZER.encode("b")]
    assert tokens == expected
    assert len(text) < counting.characters - 2 < len(text) + 4 * 100


@pytest.mark.parametrize("text", ["x" * 3000, "\u4f60\u597d" * 900, " " * 3000, "1 " * 2000, "a\n" * 1000])
def test_text_without_words_is_cut_without_a_loss(monkeypatch, text):
    monkeypatch.setattr(module, "CHARACTERS_AT_ONCE", 1000)
    assert list(token_stream([text], TOKENIZER)) == [BOS, *TOKENIZER.encode(text)]


@pytest.mark.parametrize("domain", ["code_algos", "law_dc", "shakespeare", "math_gsm8k"])
@pytest.mark.parametrize("model", ["stories260K", "smollm2"])
def test_pieces_have_the_tokens_of_the_whole(monkeypatch, request, domain, model):
    named = model == "smollm2"
    folder = request.getfixturevalue("smollm2_dir") if named else shared_path("models/stories260K")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (shared_path(f"data/{domain}") / "train.jsonl").read_text()[:60_000].replace("\\n", "\n")
    monkeypatch.setattr(module, "CHARACTERS_AT_ONCE", 2000)
    whole = tokenizer.encode(text, add_special_tokens=False)
    assert list(token_stream([text], tokenizer))[1:] == whole


def test_answers_of_a_long_document_have_their_tokens_with_a_loss(monkeypatch):
    monkeypatch.setattr(module, "CHARACTERS_AT_ONCE", 1000)
    text, ranges = words(5000), (10, 20, 900, 2500, 4990, 5000)
    tokens = list(token_stream([AnsweredText(text, ranges)], TOKENIZER))
    answered = {at for start, end in zip(ranges[::2], ranges[1::2], strict=True) for at in range(start, end)}
    expected = [token if at in answered else ~token for at, token in enumerate(TOKENIZER.encode(text))]
    assert tokens == [~BOS, *expected]


def test_a_tokenizer_that_does_not_locate_its_tokens(monkeypatch):
    class Slow(Counting):
        is_fast = False

    monkeypatch.setattr(module, "CHARACTERS_AT_ONCE", 1000)
    text = words(5000)
    assert list(token_stream([text], Slow())) == [BOS, *TOKENIZER.encode(text)]
    with pytest.raises(UserError, match="a fast tokenizer .* got one without"):
        list(token_stream([AnsweredText("a", (0, 1))], Slow()))
