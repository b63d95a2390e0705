"""Text as batches of tokens."""

from __future__ import annotations

import json

import pytest
import torch

from configs.errors import UserError
from federated.data.blocks import pack_blocks
from federated.data.text_batches import text_batches, texts_by_domain
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
    with pytest.raises(UserError, match="valid, train or all"):
        texts_by_domain(sources, "test")


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


def test_a_domain_without_text_and_blocks_beyond_the_model_are_refused(tiny_tokenizer):
    options = {"batch_size": 2, "max_blocks": 0}
    with pytest.raises(UserError, match="documents with text"):
        list(text_batches([["a"], [""]], tiny_tokenizer, block_size=4, **options))
    with pytest.raises(UserError, match="max_position_embeddings 8"):
        list(text_batches([["a"]], tiny_tokenizer, block_size=9, max_position_embeddings=8, **options))
