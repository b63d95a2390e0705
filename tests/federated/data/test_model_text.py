from __future__ import annotations

import json

import pytest
import torch

from configs.block_size import DEFAULT_BLOCK_SIZE
from configs.errors import UserError
from federated.data.model_text import open_model_text
from federated.data.text_batches import text_batches
from models.files.fingerprint import checkpoint_fingerprint


@pytest.fixture
def sources(tmp_path) -> list[str]:
    """Two domains of ten documents each, of which one is held out."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("a", "b"):
        rows = [json.dumps({"text": f"{name} {number} " * 6}) for number in range(10)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return [str(folder / f"{name}.jsonl") for name in ("a", "b")]


def opened(directory, **changes):
    options = {"precision": "auto", "device": "cpu", "block_size": 16, "batch_size": 3, "max_blocks": 0}
    return open_model_text(str(directory), **{**options, **changes})


def test_blocks_are_as_long_as_asked_or_as_the_context_allows(tiny_graph_dir):
    context = opened(tiny_graph_dir).model.config.max_position_embeddings
    assert opened(tiny_graph_dir).block_size == 16
    assert opened(tiny_graph_dir, block_size=None).block_size == min(DEFAULT_BLOCK_SIZE, context) == context
    with pytest.raises(UserError, match=f"block-size to be at most .* {context}, got {context + 1}"):
        opened(tiny_graph_dir, block_size=context + 1)


def test_batches_are_those_of_the_documents_of_the_split(tiny_graph_dir, sources):
    text = opened(tiny_graph_dir)
    found = list(text.batches(sources, "valid"))
    held_out = [["a 9 " * 6], ["b 9 " * 6]]
    expected = list(text_batches(held_out, text.tokenizer, block_size=16, batch_size=3, max_blocks=0))
    assert [(ids.tolist(), mask.tolist()) for ids, mask in found] == [
        (ids.tolist(), mask.tolist()) for ids, mask in expected
    ]
    tokens = {
        split: sum(int(mask.sum()) for _, mask in text.batches(sources, split))
        for split in ("train", "valid", "all")
    }
    # A document is BOS and 24 characters; of 225 tokens, the last one has a block to itself and is left out.
    assert tokens == {"train": 2 * 224, "valid": 2 * 25, "all": 2 * 250}
    assert max(len(ids) for ids, _ in text.batches(sources, "all")) == 3
    limited = list(opened(tiny_graph_dir, max_blocks=1).batches(sources, "all"))
    assert torch.cat([ids for ids, _ in limited]).shape == (2, 16)


def test_an_unknown_split_is_refused_before_the_first_batch(tiny_graph_dir, sources):
    with pytest.raises(UserError, match="train, valid or all"):
        opened(tiny_graph_dir).batches(sources, "tset")


def test_provenance_names_model_router_and_text(tiny_graph_dir):
    assert opened(tiny_graph_dir, max_blocks=5).provenance(["wikimix", "x.txt"], "valid") == {
        "model": str(tiny_graph_dir),
        "model_fingerprint": checkpoint_fingerprint(str(tiny_graph_dir)),
        "router": "graph walk",
        "datasets": ["wikimix", "x.txt"],
        "split": "valid",
        "block_size": 16,
        "batch_size": 3,
        "max_blocks": 5,
    }


def test_a_model_without_experts_is_refused(tiny_llama_dir):
    with pytest.raises(UserError, match="experts"):
        opened(tiny_llama_dir)
