from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from federated.data.answers import RANGES
from federated.data.partition import ClientDocuments, documents_of_client, partition_documents


def corpus(**sizes: int) -> Dataset:
    """Numbered documents of each domain; every fifth is held out."""
    rows = [
        {"text": f"{domain} {number}", "domain": domain, "split": "valid" if number % 5 == 4 else "train"}
        for domain, size in sizes.items()
        for number in range(size)
    ]
    return Dataset.from_list(rows)


def texts(clients: list[ClientDocuments]) -> list[Any]:
    return [text for client in clients for text in client.train + client.valid]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), min_size=12, max_size=60),
    st.sampled_from(["domain", "iid", "dirichlet:0.5", "dirichlet:100", "natural:sub", "natural:domain"]),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_every_document_lands_exactly_once(documents, partition, num_clients, seed):
    dataset = Dataset.from_list(
        [
            {
                "text": str(number),
                "domain": domain,
                "sub": number % 5,
                "split": "train" if draw else "valid",
            }
            for number, (domain, draw) in enumerate(documents)
        ]
    )
    try:
        clients = partition_documents(dataset, partition=partition, num_clients=num_clients, seed=seed)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert len(clients) == len({client.name for client in clients}) == num_clients
    assert sorted(texts(clients), key=int) == [str(number) for number in range(len(documents))]
    for client in clients:
        assert client.train and client.valid
        assert all(documents[int(text)][1] for text in client.train), "a held-out document is trained on"


@pytest.mark.parametrize("partition", ["domain", "iid", "dirichlet:0.5", "natural:domain"])
def test_the_part_of_one_client_is_that_of_the_whole_partition(partition):
    keys = {"partition": partition, "num_clients": 3, "seed": 1}
    dataset = corpus(a=20, b=15, c=12, d=9)
    parts = [documents_of_client(dataset, client, **keys) for client in range(3)]
    assert parts == partition_documents(dataset, **keys)


def test_a_client_per_domain_in_the_order_of_the_domains():
    clients = partition_documents(corpus(small=5, large=20), partition="domain", num_clients=2, seed=0)
    assert [client.name for client in clients] == ["small", "large"]
    assert clients[0].train == ["small 0", "small 1", "small 2", "small 3"] and clients[0].valid == [
        "small 4"
    ]
    assert (len(clients[1].train), len(clients[1].valid)) == (16, 4)


def test_domains_are_dealt_largest_first_to_the_smallest_client():
    # 50 | 40; 30 -> the second (70); 25 -> the first (75); 10 -> the second (80).
    dataset = corpus(e=10, d=25, c=30, b=40, a=50)
    clients = partition_documents(dataset, partition="domain", num_clients=2, seed=0)
    assert [client.name for client in clients] == ["e+c+b", "d+a"]
    assert [len(client.train + client.valid) for client in clients] == [80, 75]


def test_answers_stay_with_their_documents():
    rows = corpus(a=10, b=10)
    ranged = rows.add_column(RANGES, [[number, number + 1] for number in range(20)])
    for partition in ("domain", "iid"):
        options = {"partition": partition, "num_clients": 2, "seed": 0}
        plain, answered = (partition_documents(each, **options) for each in (rows, ranged))
        assert [each.text for each in texts(answered)] == texts(plain)
        numbers = {text: number for number, text in enumerate(rows["text"])}
        assert all(each.ranges == (numbers[each.text], numbers[each.text] + 1) for each in texts(answered))
    with pytest.raises(UserError, match="natural:COLUMN to name one of domain, got 'answer ranges'"):
        partition_documents(ranged, partition=f"natural:{RANGES}", num_clients=2, seed=0)


def test_names_are_distinct_and_safe():
    dataset = corpus(**{"a/b": 5, "a b": 5})
    names = [
        client.name for client in partition_documents(dataset, partition="domain", num_clients=2, seed=0)
    ]
    assert names == ["a_b-0", "a_b-1"]
    many = corpus(**{f"domain{number}": 2 for number in range(60)})
    (client,) = partition_documents(many, partition="domain", num_clients=1, seed=0)
    assert client.name == "domain0+domain1+domain2+57-more"


def test_iid_mixes_the_domains_evenly_and_follows_the_seed():
    dataset = corpus(a=100, b=100)
    clients = partition_documents(dataset, partition="iid", num_clients=4, seed=0)
    assert [client.name for client in clients] == ["client-0", "client-1", "client-2", "client-3"]
    for client in clients:
        counts = Counter(text[0] for text in client.train + client.valid)
        assert counts.total() == 50 and min(counts.values()) > 12
    assert clients == partition_documents(dataset, partition="iid", num_clients=4, seed=0)
    assert clients != partition_documents(dataset, partition="iid", num_clients=4, seed=1)


def skew(clients: list[ClientDocuments]) -> float:
    """The largest share of one label at a client, averaged over clients."""
    shares = []
    for client in clients:
        counts = Counter(text.split()[0] for text in client.train + client.valid)
        shares.append(max(counts.values()) / counts.total())
    return sum(shares) / len(shares)


def test_a_smaller_alpha_skews_the_labels_more():
    dataset = corpus(a=300, b=300, c=300)
    even = partition_documents(dataset, partition="dirichlet:1000", num_clients=3, seed=1)
    skewed = partition_documents(dataset, partition="dirichlet:0.2", num_clients=3, seed=1)
    assert skew(even) < 0.4 < 0.6 < skew(skewed)
    assert skewed == partition_documents(dataset, partition="dirichlet:0.2", num_clients=3, seed=1)


def test_dirichlet_takes_sub_or_category_where_there_is_one_domain():
    dataset = corpus(a=200)
    for column in ("sub", "category"):
        labeled = dataset.add_column(column, [f"s{number % 2}" for number in range(200)])
        clients = partition_documents(labeled, partition="dirichlet:0.05", num_clients=2, seed=0)
        odd_share = [sum(int(text.split()[1]) % 2 for text in c.train) / len(c.train) for c in clients]
        assert max(odd_share) - min(odd_share) > 0.5
    with pytest.raises(UserError, match="got one domain and the columns domain; use iid"):
        partition_documents(dataset, partition="dirichlet:0.5", num_clients=2, seed=0)


def test_natural_deals_the_labels_of_a_column_by_size():
    dataset = corpus(a=60).add_column("meta.source", [None] * 10 + [1] * 20 + [2] * 30)
    clients = partition_documents(dataset, partition="natural:meta.source", num_clients=2, seed=0)
    assert [client.name for client in clients] == ["client-0", "client-1"]
    numbers = [{int(text.split()[1]) for text in client.train + client.valid} for client in clients]
    assert numbers == [set(range(30)), set(range(30, 60))]


def test_a_client_without_held_out_documents_holds_out_its_last_tenth():
    dataset = Dataset.from_dict(
        {
            "text": [str(number) for number in range(33)],
            "domain": ["a"] * 30 + ["b"] * 3,
            "split": ["train"] * 32 + ["valid"],
        }
    )
    a, b = partition_documents(dataset, partition="domain", num_clients=2, seed=0)
    assert a.train == [str(number) for number in range(27)] and a.valid == ["27", "28", "29"]
    assert (b.train, b.valid) == (["30", "31"], ["32"])


@pytest.mark.parametrize(
    ("partition", "num_clients", "message"),
    [
        ("domain", 3, "at most as many clients as domains (2), got 3"),
        ("natural:domain", 3, "at most as many clients as values of 'domain' (2), got 3"),
        ("natural:domian", 2, "one of domain, got 'domian' (did you mean 'domain'?)"),
        ("natural:text", 2, "one of domain, got 'text'"),
        ("iid", 6, "at least two documents a client, one to train on and one held out, got 10 for 6 clients"),
        ("dirichlet:0.001", 4, "expected a draw that leaves none of 4 clients empty"),
        ("random", 2, "expected partition to be one of"),
    ],
)
def test_impossible_partitions_are_refused_in_one_line(partition, num_clients, message):
    with pytest.raises(UserError) as caught:
        partition_documents(corpus(a=5, b=5), partition=partition, num_clients=num_clients, seed=0)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_client_without_training_documents_is_named():
    dataset = Dataset.from_dict(
        {"text": list("1234"), "domain": list("aabb"), "split": ["train"] + ["valid"] * 3}
    )
    with pytest.raises(UserError, match="client 'b' .* got 0 and 2"):
        partition_documents(dataset, partition="domain", num_clients=2, seed=0)
