from __future__ import annotations

import json

import pytest
import torch

from benchmarks.support import material
from benchmarks.support.material import (
    domain_blocks,
    mixed_blocks,
    model_path,
    stored_graph,
    write_client_data,
)
from clients.data_stream import client_documents, pack_client
from configs.schema import RunConfig
from models.checkpoints.load import load_tokenizer

DOCUMENTS = [f"document {number} says " + "one two three four " * 4 for number in range(30)]


@pytest.fixture
def source(tmp_path) -> str:
    folder = tmp_path / "source"
    folder.mkdir()
    for split, texts in (("train", DOCUMENTS[:20]), ("valid", DOCUMENTS[20:])):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{split}.jsonl").write_text(rows)
    return str(folder)


def test_the_data_of_a_client_packs_into_the_blocks_asked_for(source, tmp_path):
    model = model_path("any", quick=True)
    write_client_data(tmp_path / "own", source, model, train_tokens=8 * 16, valid_tokens=3 * 16, seed=1)
    documents = client_documents(RunConfig(seed=5), 0, data_dir=str(tmp_path / "own"))
    train, valid = pack_client(documents, load_tokenizer(model), 16, 16)
    # A cut text may be tokenized in another way at its end.
    assert abs(train.num_tokens - 8 * 16) <= 2 and abs(valid.num_tokens - 3 * 16) <= 2
    assert all(any(original.startswith(text) for original in DOCUMENTS[:20]) for text in documents.train)
    assert all(any(original.startswith(text) for original in DOCUMENTS[20:]) for text in documents.valid)


def test_the_seed_chooses_training_documents_only(source, tmp_path):
    model = model_path("any", quick=True)
    for seed in (0, 1):
        write_client_data(tmp_path / str(seed), source, model, train_tokens=90, valid_tokens=90, seed=seed)
    read = {
        (seed, split): (tmp_path / str(seed) / f"{split}.jsonl").read_text()
        for seed in (0, 1)
        for split in ("train", "valid")
    }
    assert read[0, "train"] != read[1, "train"] and read[0, "valid"] == read[1, "valid"]


def test_a_source_with_too_few_tokens_is_taken_whole(source, tmp_path):
    model = model_path("any", quick=True)
    write_client_data(tmp_path / "all", source, model, train_tokens=10**6, valid_tokens=10**6, seed=0)
    lines = (tmp_path / "all" / "train.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["text"] for line in lines) == sorted(DOCUMENTS[:20])


def test_mixed_blocks_are_those_of_each_source_in_order():
    sources, model = ["wikimix:json", "wikimix:prose"], model_path("any", quick=True)
    mixed = mixed_blocks(sources, model, split="valid", block_size=16, max_blocks=3, seed=2)
    assert mixed.input_ids.shape == (6, 16)
    for number, source in enumerate(sources):
        alone = domain_blocks(source, model, split="valid", block_size=16, max_blocks=3, seed=2)
        assert torch.equal(mixed.input_ids[3 * number : 3 * number + 3], alone.input_ids)
        assert torch.equal(mixed.labels[3 * number : 3 * number + 3], alone.labels)


def test_a_graph_is_bootstrapped_once_for_the_same_facts(tmp_path, monkeypatch):
    made = []

    def write(folder, path, experts, tokens):
        made.append((path, experts, tokens))
        folder.mkdir()

    monkeypatch.setattr(material, "write_bootstrapped", write)
    facts = {"model": "any", "calibration_tokens": 64, "seed": 0, "quick": True}
    first = stored_graph(tmp_path, experts=4, **facts)
    assert stored_graph(tmp_path, experts=4, **facts) == first and first.parent == tmp_path
    assert stored_graph(tmp_path, experts=8, **facts) != first
    assert made == [(model_path("any", quick=True), experts, 64) for experts in (4, 8)]
