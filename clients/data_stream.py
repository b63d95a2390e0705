"""Documents of one client, and its training and held-out blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from configs.block_size import choose_block_size
from configs.errors import UserError
from configs.node_config import NodeConfig
from configs.schema import RunConfig
from federated.data.blocks import Blocks, pack_blocks
from models.checkpoints.load import load_tokenizer
from models.files.config_file import read_config
from models.runtime.token_ids import may_exceed

# Purposes of ``round_generator``.
BATCH_ORDER, UPLOAD_SELECTION = 1, 2

# The document readers take seconds to import. They are imported where they are used, since in a deployment each message
# starts a new process and only the first one reads documents.
if TYPE_CHECKING:
    from datasets import Dataset

    from federated.data.chat_template import ChatTemplate
    from federated.data.partition import ClientDocuments


def client_documents(
    config: RunConfig,
    partition: int,
    *,
    data_dir: str = "",
    chat: ChatTemplate | None = None,
    copy: Path | None = None,
) -> ClientDocuments:
    """Documents of one client.

    Args:
        config: run configuration, for data sources and partition.
        partition: index of the client, from 0.
        data_dir: private data, all of it this client's; empty: its part of the run's data.
        chat: template of chats; None: their plain form.
        copy: file with the run's data, written by the first client of the run on this machine; None: no such file.

    Raises:
        UserError: data that does not exist, or none for this client.
    """
    from federated.data.documents import load_documents
    from federated.data.partition import documents_of_client, partition_documents

    if data_dir:
        documents = load_documents(
            [data_dir], template=config.template, chat=chat, loss_on=config.loss_on, seed=config.seed
        )
        own = partition_documents(documents, partition="iid", num_clients=1, seed=config.seed)[0]
        return replace(own, name=f"client-{partition}")
    if not 0 <= partition < config.num_clients:
        raise UserError(
            f"expected a partition-id from 0 to {config.num_clients - 1} (num-clients is {config.num_clients}), "
            f"got {partition}"
        )
    return documents_of_client(
        _run_documents(config, chat, copy),
        partition,
        partition=config.partition,
        num_clients=config.num_clients,
        seed=config.seed,
    )


def all_clients(config: RunConfig, *, chat: ChatTemplate | None = None) -> list[ClientDocuments]:
    """Documents of every client, for a run whose data is in one place; ``chat`` as in ``client_documents``.

    Raises:
        UserError: data that does not exist, or a client without documents.
    """
    from federated.data.partition import partition_documents

    return partition_documents(
        _run_documents(config, chat, None),
        partition=config.partition,
        num_clients=config.num_clients,
        seed=config.seed,
    )


def _run_documents(config: RunConfig, chat: ChatTemplate | None, copy: Path | None) -> Dataset:
    """Documents of all clients of a run, from the file ``copy`` where it is given."""
    from clients.state.run_documents import copied_documents
    from federated.data.documents import load_documents

    load = partial(
        load_documents,
        config.sources,
        template=config.template,
        chat=chat,
        loss_on=config.loss_on,
        wikimix_documents=config.train_documents,
        seed=config.seed,
    )
    return load() if copy is None else copied_documents(copy, load)


def pack_client(
    documents: ClientDocuments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    context: int,
    vocab_size: int | None = None,
) -> tuple[Blocks, Blocks]:
    """Training and held-out blocks of a client: ``choose_block_size`` tokens each, ids below ``vocab_size``."""
    train, valid = (
        pack_blocks(
            texts,
            tokenizer,
            block_size=choose_block_size(block_size, context),
            vocab_size=vocab_size,
        )
        for texts in (documents.train, documents.valid)
    )
    return train, valid


def node_blocks(
    config: RunConfig, node: NodeConfig, graph: str, *, folder: Path | None = None
) -> tuple[str, Blocks, Blocks]:
    """Name of a node's client, and its training and held-out blocks, for a graph with its tokenizer.

    Args:
        config: run configuration.
        node: node configuration, for its partition and private data.
        graph: folder of the graph.
        folder: receives the run's data of the first client, which others of the run then read; None: no such copy.

    Raises:
        UserError: as ``client_documents`` and ``pack_client``.
    """
    from federated.data.chat_template import ChatTemplate

    shape, tokenizer = read_config(graph), load_tokenizer(graph)
    documents = client_documents(
        config,
        node.partition_id,
        data_dir=node.data_dir,
        chat=ChatTemplate(lambda: tokenizer),
        # Chats are rendered with the tokenizer of the graph, which a node may have at a path of its own.
        copy=folder and folder / f"documents-{hashlib.sha256(graph.encode()).hexdigest()[:8]}.arrow",
    )
    train, valid = pack_client(
        documents, tokenizer, config.block_size, shape.max_position_embeddings, shape.vocab_size
    )
    return documents.name, train, valid


def check_tokens(clients: Sequence[ClientDocuments], graph: str, block_size: int) -> None:
    """Check that the tokens of all clients are in the embedding of a graph.

    Documents are tokenized only where the tokenizer is larger than the embedding.

    Raises:
        UserError: names the token.
    """
    config, tokenizer = read_config(graph), load_tokenizer(graph)
    if may_exceed(tokenizer, config.vocab_size):
        for client in clients:
            pack_client(client, tokenizer, block_size, config.max_position_embeddings, config.vocab_size)


def round_generator(seed: int, server_round: int, partition: int, *, purpose: int) -> torch.Generator:
    """Random generator of one client in one round, the same in every process.

    Args:
        seed: of the run.
        server_round: number of the round, from 1.
        partition: index of the client, from 0.
        purpose: 0 to 6, for independent streams: ``BATCH_ORDER`` draws the order of the training blocks.
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + server_round * 1_009 + partition) * 7 + purpose)
