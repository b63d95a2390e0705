from __future__ import annotations

import pytest

from federated.data.splits import WORDS, assign_splits, held_out_count, hold_out, split_word


@pytest.mark.parametrize(
    ("split", "word"), [(split, word) for split, words in WORDS.items() for word in words]
)
def test_every_split_word_counts_alone_and_beside_other_signs(split, word):
    for name in (
        word,
        word.upper(),
        f"my-{word}-00000-of-00001",
        f"local_{word}_3",
        f"{word}0",
        f"{word}set",
    ):
        assert split_word(name) == split


def test_parts_of_other_words_are_no_split_words():
    for name in (
        "latest",
        "constrained",
        "value",
        "developers",
        "evaluated",
        "interval",
        "testimony",
        "",
        None,
        3,
    ):
        assert split_word(name) == ""


def test_the_first_name_and_its_last_word_decide():
    assert split_word("part-0", "validation", "train") == "valid"
    assert split_word("train.eval") == "test" and split_word("train", "test") == "train"


@pytest.mark.parametrize(
    ("words", "splits"),
    [
        (["train", "valid", "test", ""], ["train", "valid", None, None]),
        (["test", "train"], ["valid", "train"]),
        (["train", "train"], ["", ""]),
        (["valid", "test"], ["", ""]),
        (["", ""], ["", ""]),
        ([], []),
    ],
)
def test_test_is_held_out_only_without_valid(words, splits):
    assert assign_splits(words) == splits


@pytest.mark.parametrize(("count", "held_out"), [(0, 0), (1, 0), (2, 1), (9, 1), (19, 1), (20, 2), (100, 10)])
def test_held_out_count(count, held_out):
    assert held_out_count(count) == held_out


def test_the_last_documents_of_each_domain_are_held_out():
    rows = [{"domain": domain} for domain in "ababb"]
    hold_out(rows)
    assert [row["split"] for row in rows] == ["train", "train", "valid", "train", "valid"]
