"""Documents with the ranges of their answers."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from federated.data.answers import RANGES, AnsweredText, answer_mask, document_text, documents_of


def test_documents_are_texts_unless_the_dataset_has_ranges():
    rows = {"text": ["ab", "c"], "domain": ["x", "y"]}
    assert documents_of(Dataset.from_dict(rows)) == ["ab", "c"]
    documents = documents_of(Dataset.from_dict(rows | {RANGES: [[0, 1], []]}))
    assert documents == [AnsweredText("ab", (0, 1)), AnsweredText("c", ())]
    assert [document_text(each) for each in ["ab", *documents]] == ["ab", "ab", "c"]


@pytest.mark.parametrize(
    ("offsets", "ranges", "mask"),
    [
        ([(0, 2), (2, 4), (4, 6)], (2, 4), "010"),
        ([(0, 2), (2, 4), (4, 6)], (3, 5), "011"),  # a token that is partly in the answer is one of it
        ([(0, 2), (2, 4), (4, 6)], (0, 1, 5, 6), "101"),
        ([(0, 2), (2, 4), (4, 6)], (2, 2), "000"),
        ([(0, 2), (2, 4), (4, 6)], (), "000"),
        (
            [(0, 1), (1, 2), (3, 3), (3, 4), (4, 5)],
            (1, 4),
            "01110",
        ),  # a token without characters inside an answer
        ([(0, 1), (0, 1), (1, 2)], (0, 1), "110"),  # the bytes of one character
        ([], (0, 1), ""),
    ],
)
def test_tokens_of_answers(offsets, ranges, mask):
    found = answer_mask(torch.tensor(offsets).view(-1, 2), ranges)
    assert "".join(str(int(each)) for each in found) == mask
