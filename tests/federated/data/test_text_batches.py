"""Text as batches of tokens."""

from __future__ import annotations

import json
from enum import StrEnum

import pytest
import torch

from configs.errors import UserError
from federated.data.answers import AnsweredText
from federated.data.blocks import pack_blocks
from federated.data.text_batches import even_blocks, text_batches, texts_by_domain
from models.runtime.perplexity import IGNORED


def test_texts_are_those_of_the_split_by_domain(tmp_path):
    for name in ("a", "b"):
        rows = [{"text": f"{name}{index}"} for index in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    train, valid, both = (texts_by_domain(sources, split) for split in ("train", "valid", "all"))
    assert set(train) == set(valid) == {"a", "b"}
    assert valid["a"] == ["a18", "a19"] and len(train["b"]) == 18
    assert both["a"] == train["a"] + valid["a"]
    with pytest.raises(UserError, match="train, valid or all"):
        texts_by_domain(sources, "test")


def test_a_split_without_documents_is_an_error_that_names_source_and_way_out(tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "only"}))
    source = str(tmp_path / "one.jsonl")
    with pytest.raises(UserError, match="in the valid split of .*one.jsonl, got none; .* split train or all"):
        texts_by_domain([source], "valid")
    with pytest.raises(UserError, match="with 'valid' in its name"):
        texts_by_domain([source], StrEnum("Split", {"VALID": "valid"})("valid"))
    assert texts_by_domain([source], "train") == {"one": ["only"]}


def test_a_domain_without_documents_in_the_split_is_left_out_aloud(tmp_path):
    for name, count in {"one": 1, "two": 2}.items():
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps({'text': name})}\n" * count)
    sources = [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]
    with pytest.warns(UserWarning, match="valid split of one: these domains are left out"):
        assert texts_by_domain(sources, "valid") == {"two": ["two"]}


@pytest.mark.parametrize("max_blocks", [0, 2])
def test_batches_hold_the_blocks_of_every_domain_and_leave_the_padding_out(tiny_tokenizer, max_blocks):
    domains = [["hello", "world again"], ["x"] * 9]
    options = {"block_size": 4, "max_blocks": max_blocks}
    batches = list(text_batches(domains, tiny_tokenizer, batch_size=2, **options))
    expected = [pack_blocks(texts, tiny_tokenizer, **options) for texts in domains]
    ids, counted = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(counted, torch.cat([each.labels for each in expected]) != IGNORED)
    assert torch.equal(ids[counted], torch.cat([each.input_ids for each in expected])[counted])
    assert max(len(batch) for batch, _ in batches) == 2


def test_a_domain_without_text_is_refused(tiny_tokenizer):
    options = {"batch_size": 2, "max_blocks": 0}
    with pytest.raises(UserError, match="documents with text"):
        list(text_batches([["a"], [""]], tiny_tokenizer, block_size=4, **options))


def test_answers_are_the_tokens_of_the_mask(tmp_path, tiny_tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "a", "answer": "bc"}) + "\n")
    texts = texts_by_domain([str(tmp_path / "a.jsonl")], "all", loss_on="answers")
    (document,) = texts["a"]
    assert document == AnsweredText("User: a\n\nAssistant: bc", (20, 22))
    ((ids, counted),) = text_batches(
        texts.values(), tiny_tokenizer, block_size=32, batch_size=1, max_blocks=0
    )
    assert ids[counted].tolist() == tiny_tokenizer.encode("bc", add_special_tokens=False)


def test_blocks_come_as_many_from_each_domain_as_its_text_lasts(tiny_tokenizer):
    domains = [["a" * 31] * 8, ["b" * 31] * 2, ["c" * 31] * 8]
    for blocks, limit, counts in (
        (0, 0, (8, 2, 8)),
        (9, 0, (3, 2, 3)),
        (10, 0, (4, 2, 4)),
        (9, 1, (1, 1, 1)),
    ):
        made = even_blocks(domains, tiny_tokenizer, blocks=blocks, block_size=32, max_blocks=limit)
        whole = [pack_blocks(texts, tiny_tokenizer, block_size=32) for texts in domains]
        expected = [each.input_ids[:count] for each, count in zip(whole, counts, strict=True)]
        assert torch.equal(made.input_ids, torch.cat(expected)) and torch.equal(made.labels, made.input_ids)
    with pytest.raises(UserError, match="expected token ids below 7"):
        even_blocks(domains, tiny_tokenizer, blocks=0, block_size=32, vocab_size=7)
