"""Partition of a dataset of documents into the private documents of each client, with flwr-datasets' partitioners."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    GroupedNaturalIdPartitioner,
    IidPartitioner,
    Partitioner,
)

from configs.errors import UserError, nearest
from configs.values import parse_partition
from federated.data.answers import RANGES, Document, documents_of
from federated.data.splits import held_out_count

_LABEL_COLUMNS = ("domain", "sub", "category")
_KEY = "partition key"


@dataclass(frozen=True)
class ClientDocuments:
    """Training and held-out documents of one client."""

    name: str
    train: list[Document]
    valid: list[Document]


def partition_documents(
    documents: Dataset, *, partition: str, num_clients: int, seed: int
) -> list[ClientDocuments]:
    """Partition ``documents`` (of ``load_documents``) among ``num_clients`` clients.

    ``partition`` is ``domain`` (clients in the order in which their first domain appears), ``iid``, ``dirichlet:ALPHA``
    or ``natural:COLUMN``. With fewer clients than domains or labels, these are distributed by size. A client without
    held-out documents holds out its last 10 %, at least one.

    Raises :class:`UserError` for fewer domains, labels or documents than clients, an unknown column, or a client
    without a training document.
    """
    names, partitioner = _partitioner(documents, partition, num_clients, seed)
    return [_client(name, _load(partitioner, client, num_clients)) for client, name in enumerate(names)]


def documents_of_client(
    documents: Dataset, client: int, *, partition: str, num_clients: int, seed: int
) -> ClientDocuments:
    """Part of one client in ``partition_documents``; the other clients' documents are not read.

    Args:
        documents: of all clients.
        client: index of the client, from 0.
        partition: as for ``partition_documents``.
        num_clients: clients of the partition.
        seed: of the partition.

    Raises:
        UserError: as ``partition_documents``, for this client.
    """
    names, partitioner = _partitioner(documents, partition, num_clients, seed)
    return _client(names[client], _load(partitioner, client, num_clients))


def _partitioner(
    documents: Dataset, partition: str, num_clients: int, seed: int
) -> tuple[list[str], Partitioner]:
    """Names of the clients, and the partitioner of the documents."""
    kind, argument = parse_partition(partition)
    if len(documents) < 2 * num_clients:
        raise UserError(
            "expected at least two documents a client, one to train on and one held out, "
            f"got {len(documents)} for {num_clients} clients; use fewer clients or more data"
        )
    names = [f"client-{client}" for client in range(num_clients)]
    if kind == "domain":
        labels = _labels(documents, "domain")
        dealt = _deal(labels, num_clients, "domains")
        names = _names(dealt)
        partitioner, keyed = _by_dealt_labels(documents, labels, dealt)
    elif kind == "natural":
        labels = _labels(documents, argument)
        dealt = _deal(labels, num_clients, f"values of {argument!r}")
        partitioner, keyed = _by_dealt_labels(documents, labels, dealt)
    elif kind == "dirichlet":
        partitioner, keyed = _by_dirichlet(documents, float(argument), num_clients, seed)
    else:
        # The partitioner cuts contiguous shards, and documents come ordered by source.
        partitioner, keyed = IidPartitioner(num_clients), documents.shuffle(seed=seed)
    partitioner.dataset = keyed
    return names, partitioner


def _by_dealt_labels(
    documents: Dataset, labels: Iterable[str], dealt: list[list[str]]
) -> tuple[Partitioner, Dataset]:
    """Partitioner with one client per group of labels, and the dataset with its key column."""
    owner = {label: client for client, group in enumerate(dealt) for label in group}
    keyed = documents.add_column(_KEY, [owner[label] for label in labels])
    return GroupedNaturalIdPartitioner(_KEY, group_size=1, sort_unique_ids=True), keyed


def _by_dirichlet(
    documents: Dataset, alpha: float, num_clients: int, seed: int
) -> tuple[Partitioner, Dataset]:
    keyed = documents.add_column(_KEY, _label_column(documents))
    partitioner = DirichletPartitioner(
        num_clients, _KEY, alpha, min_partition_size=min(2, len(documents) // num_clients), seed=seed
    )
    return partitioner, keyed


def _label_column(documents: Dataset) -> list[str]:
    """The first of the columns domain, sub and category with more than one value."""
    for column in _LABEL_COLUMNS:
        if column in documents.column_names and len(set(labels := _labels(documents, column))) > 1:
            return labels
    columns = ", ".join(_columns(documents))
    raise UserError(
        "expected several domains, or several values of sub or category, for dirichlet:ALPHA, "
        f"got one domain and the columns {columns}; use iid or natural:COLUMN"
    )


def _labels(documents: Dataset, column: str) -> list[str]:
    """Values of a column as text; missing values form a label of their own."""
    known = _columns(documents)
    if column not in known:
        hint = nearest(column, known)
        raise UserError(f"expected natural:COLUMN to name one of {', '.join(known)}, got {column!r}{hint}")
    return ["" if value is None else str(value) for value in documents[column][:]]


def _columns(documents: Dataset) -> list[str]:
    return [name for name in documents.column_names if name not in ("text", "split", RANGES)]


def _deal(labels: Iterable[str], num_clients: int, what: str) -> list[list[str]]:
    """Greedy balanced groups of labels: the largest label first, each to the client with the fewest documents so far.

    Both the groups and the labels in them are ordered by first appearance.
    """
    sizes = Counter(labels)
    if len(sizes) < num_clients:
        raise UserError(
            f"expected at most as many clients as {what} ({len(sizes)}), got {num_clients}; "
            "use fewer clients or another partition, e.g. iid"
        )
    groups: list[list[str]] = [[] for _ in range(num_clients)]
    loads = [0] * num_clients
    for label, size in sizes.most_common():
        client = loads.index(min(loads))
        groups[client].append(label)
        loads[client] += size
    order = {label: position for position, label in enumerate(sizes)}
    return sorted(
        (sorted(group, key=order.__getitem__) for group in groups), key=lambda group: order[group[0]]
    )


def _load(partitioner: Partitioner, client: int, num_clients: int) -> Dataset:
    try:
        with warnings.catch_warnings():
            # The Dirichlet partitioner warns on each repeated draw after one that leaves a client empty.
            warnings.simplefilter("ignore", UserWarning)
            return partitioner.load_partition(client)
    except ValueError:
        raise UserError(
            f"expected a draw that leaves none of {num_clients} clients empty, got none in ten; "
            "use fewer clients, more data or a larger ALPHA"
        ) from None


def _client(name: str, rows: Dataset) -> ClientDocuments:
    columns = [column for column in ("text", RANGES) if column in rows.column_names]
    documents, splits = documents_of(rows.select_columns(columns)), rows["split"][:]
    parts = {
        wanted: [document for document, split in zip(documents, splits, strict=True) if split == wanted]
        for wanted in ("train", "valid")
    }
    train, valid = parts["train"], parts["valid"]
    if not valid:
        kept = len(train) - held_out_count(len(train))
        train, valid = train[:kept], train[kept:]
    if not train or not valid:
        raise UserError(
            f"expected client {name!r} to get at least one training and one held-out document, "
            f"got {len(train)} and {len(valid)}; use fewer clients, another partition or more data"
        )
    return ClientDocuments(name, train, valid)


def _names(dealt: list[list[str]]) -> list[str]:
    """Distinct short client names from their domains, safe as file names and TensorBoard tags."""
    names = []
    for domains in dealt:
        rest = [f"{len(domains) - 3}-more"] if len(domains) > 3 else []
        names.append(re.sub(r"[^\w.+-]+", "_", "+".join(domains[:3] + rest))[:80])
    if len(set(names)) < len(names):
        names = [f"{name}-{client}" for client, name in enumerate(names)]
    return names
