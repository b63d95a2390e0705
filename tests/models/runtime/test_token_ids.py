from __future__ import annotations

import pytest
import torch

from configs.errors import UserError
from models.runtime.token_ids import check_token_ids, embedding_rows, may_exceed
from tests.conftest import tiny_llama


def test_ids_up_to_the_last_row_are_fine():
    check_token_ids(torch.tensor([[0, 39]]), 40)
    check_token_ids(torch.zeros(0, dtype=torch.int64), 40)


def test_the_largest_id_beyond_the_embedding_is_named_with_its_token(tiny_tokenizer):
    ids = tiny_tokenizer("a 3", add_special_tokens=False, return_tensors="pt")["input_ids"]
    largest = int(ids.max())
    check_token_ids(ids, largest + 1, tiny_tokenizer)
    with pytest.raises(UserError, match=rf"below {largest}, .* got {largest} \('3'\); the tokenizer"):
        check_token_ids(ids, largest, tiny_tokenizer)
    with pytest.raises(UserError, match=rf"got {largest}; the tokenizer"):
        check_token_ids(ids, largest)


def test_a_tokenizer_may_be_as_large_as_the_embedding(tiny_tokenizer):
    assert may_exceed(tiny_tokenizer, 63) and not may_exceed(tiny_tokenizer, 64)
    assert embedding_rows(tiny_llama(vocab_size=40)) == 40
