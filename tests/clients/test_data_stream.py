from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from clients.data_stream import (
    BATCH_ORDER,
    UPLOAD_SELECTION,
    all_clients,
    check_tokens,
    client_documents,
    node_blocks,
    pack_client,
    round_generator,
)
from configs.errors import UserError
from federated.data import documents
from federated.data.partition import ClientDocuments
from tests.conftest import tiny_llama
from tests.support.paths import ROOT
from tests.support.tiny_federation import TEXTS, node_of, save_tiny_graph, tiny_config


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path / "graph", tmp_path)


def test_each_domain_is_a_client(config):
    clients = all_clients(config)
    assert [client.name for client in clients] == ["letters", "digits"]
    for client, text in zip(clients, TEXTS.values(), strict=True):
        assert (len(client.train), len(client.valid)) == (18, 2)
        assert all(text in document for document in client.train + client.valid)


def test_a_client_gets_its_part_of_the_runs_data(config):
    assert [client_documents(config, partition) for partition in (0, 1)] == all_clients(config)


def test_clients_of_a_run_read_one_copy_of_its_data(config, tmp_path, monkeypatch):
    expected, copy = all_clients(config), tmp_path / "copy.arrow"
    assert client_documents(config, 1, copy=copy) == expected[1]
    monkeypatch.setattr(documents, "load_documents", lambda *_, **__: pytest.fail("the data was read again"))
    assert client_documents(config, 0, copy=copy) == expected[0]


def test_private_data_is_all_the_clients_own(config, tmp_path):
    private = tmp_path / "my site"
    private.mkdir()
    rows = [{"text": f"document {number}"} for number in range(30)]
    (private / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    client = client_documents(config, 1, data_dir=str(private))
    assert sorted(client.train + client.valid) == sorted(row["text"] for row in rows)
    assert len(client.valid) == 3
    # Neither its folder nor its text names a client with private data; its number does, and no two are alike.
    assert client.name == "client-1"


def test_tokens_of_all_clients_are_checked_against_the_embedding(config, tmp_path, tiny_tokenizer):
    tiny_llama(vocab_size=30).save_pretrained(tmp_path / "small")
    tiny_tokenizer.save_pretrained(tmp_path / "small")
    letters, digits = all_clients(config)
    check_tokens([ClientDocuments("a", ["abc"], ["cab"])], str(tmp_path / "small"), 16)
    with pytest.raises(UserError, match="token ids below 30"):
        check_tokens([letters, digits], str(tmp_path / "small"), 16)


@pytest.mark.parametrize("partition", [-1, 2, 10])
def test_a_partition_beyond_the_clients_is_refused(config, partition):
    with pytest.raises(UserError, match=f"partition-id from 0 to 1 .*got {partition}"):
        client_documents(config, partition)


def test_a_folder_without_data_is_refused(config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected"):
        client_documents(config, 0, data_dir=str(tmp_path / "empty"))


def test_documents_become_blocks_within_the_context(tiny_tokenizer):
    documents = ClientDocuments("a", ["abc" * 10] * 3, ["xyz"])
    train, valid = pack_client(documents, tiny_tokenizer, 16, 128)
    assert train.input_ids.shape == (6, 16) and train.num_tokens == 3 * 31
    assert valid.input_ids.shape == (1, 16) and valid.num_tokens == 4
    with pytest.raises(UserError, match="block-size"):
        pack_client(documents, tiny_tokenizer, 16, 8)


def test_the_blocks_of_a_node_are_those_of_its_documents_and_its_graph(config, tmp_path, tiny_tokenizer):
    graph = str(save_tiny_graph(tmp_path / "graph", tiny_tokenizer))
    name, *blocks = node_blocks(config, node_of(partition=1), graph, folder=tmp_path / "copies")
    assert name == "digits"
    for found, expected in zip(
        blocks, pack_client(all_clients(config)[1], tiny_tokenizer, 32, 128, 64), strict=True
    ):
        assert torch.equal(found.input_ids, expected.input_ids)
        assert torch.equal(found.labels, expected.labels)
    assert len(list((tmp_path / "copies").glob("documents-*.arrow"))) == 1


def test_the_blocks_of_a_node_with_private_data_are_of_all_of_it(config, tmp_path, tiny_tokenizer):
    graph = str(save_tiny_graph(tmp_path / "graph", tiny_tokenizer))
    node = node_of({"data-dir": str(tmp_path / "texts" / "letters.jsonl")}, partition=1)
    name, train, valid = node_blocks(config, node, graph)
    letters, _ = all_clients(config)
    tokens = [sum(len(text) for text in texts) for texts in (letters.train, letters.valid)]
    assert name == "client-1"
    assert train.num_tokens + valid.num_tokens == sum(tokens) + 20  # and an end token a document


def test_a_client_whose_documents_hold_no_text_is_refused(tiny_tokenizer):
    with pytest.raises(UserError, match="documents with text"):
        pack_client(ClientDocuments("a", ["abc"], [""]), tiny_tokenizer, 16, 128)


def test_a_client_that_has_its_blocks_imports_nothing_that_reads_documents():
    code = (
        "import sys, clients.client_app; print({'datasets', 'flwr_datasets', 'seaborn'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr


def test_the_generator_of_a_round_has_a_known_seed():
    generator = round_generator(2, 3, 1, purpose=BATCH_ORDER)
    assert generator.initial_seed() == (2 * 1_000_003 + 3 * 1_009 + 1) * 7 + 1


def test_rounds_clients_and_purposes_draw_independently():
    seeds = {
        round_generator(seed, server_round, partition, purpose=purpose).initial_seed()
        for seed in (0, 1)
        for server_round in range(1, 5)
        for partition in range(8)
        for purpose in (BATCH_ORDER, UPLOAD_SELECTION)
    }
    assert len(seeds) == 2 * 4 * 8 * 2
