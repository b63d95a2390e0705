"""Whole federations of two or three clients inside the test process, message by message as on Flower's wire."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, MetricRecord, RecordDict

from clients.client_app import app as client_app
from clients.state.global_copy import GlobalCopy
from clients.state.store import ClientStore
from configs.errors import UserError
from configs.schema import RunConfig
from federated.aggregation.usage import combine_usage, unpack_usage
from federated.protocol.messages import RESEND, message_bytes, read_reply, read_request, write_reply
from federated.updates.update import RefusedUpdate
from models.checkpoints.disk_experts import open_mapped
from models.checkpoints.load import load_graph
from models.graph.attention_vectors import read_attention
from models.graph.graph_state import read_graph
from models.runtime.perplexity import LossSum, evaluate_loss
from server.flower.in_process_grid import Drop, Late
from server.rounds.loop import Federation
from server.strategies.sam_v2 import sam_v2
from server.strategies.strategy import Strategy
from tests.support.fresh_process import FreshProcessApp
from tests.support.tiny_federation import (
    TinyGrid,
    all_equal,
    client_folder_of,
    request_of,
    save_tiny_graph,
    tiny_config,
    tiny_federation,
)

EVALUATION = 4  # the exchange after three rounds


@dataclass
class Run:
    """A finished federation and the observations made during it.

    ``copies``: ``(round, node, version on the client's disk, version of the server, equal bit for bit)``.
    """

    config: RunConfig
    grid: TinyGrid
    federation: Federation
    summary: dict[str, Any]
    copies: list[tuple[int, int, int, int, bool]]

    @property
    def logs(self) -> Path:
        return Path(self.config.log_dir)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.logs / "rounds.jsonl").read_text().splitlines()]

    @property
    def merges(self) -> dict[int, dict[str, Any]]:
        found = {path.stem: json.loads(path.read_text()) for path in self.logs.glob("merge_round*.json")}
        return {int(name.removeprefix("merge_round")): merge for name, merge in found.items()}


def run(config: RunConfig, *, faults=None, app=None, before=None) -> Run:
    """Run a federation; ``before(round, node)`` is called ahead of every message."""
    grid = TinyGrid(config, faults=faults, **({"app": app} if app else {}))
    federation = tiny_federation(grid, config)
    copies: list[tuple[int, int, int, int, bool]] = []

    def compare(server_round: int, node: int) -> None:
        kept = ClientStore(client_folder_of(config, node)).copy
        copy = open_mapped(config.graph, kept)
        version = kept.load(copy)
        global_model = federation.global_model
        copies.append(
            (server_round, node, version, global_model.version, all_equal(copy, global_model.model))
        )

    grid.after = compare
    grid.before = before or grid.before
    federation.run()
    summary = federation.observer.close(out="", stopped=federation.state.stopped)
    return Run(config, grid, federation, summary, copies)


@pytest.fixture(scope="module")
def graph(tmp_path_factory, tiny_tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("federation") / "graph"
    return save_tiny_graph(directory, tiny_tokenizer, num_experts=4, visits=2)


@pytest.fixture(scope="module")
def plain(graph, tmp_path_factory) -> Run:
    """Three rounds of two clients with a merge of at most three edits after each, measured on text of the server."""
    folder = tmp_path_factory.mktemp("plain")
    config = tiny_config(graph, folder, rho_max=3, merge_max_drift=100.0)
    server_data = str(folder / "texts" / "letters.jsonl")
    return run(config.model_copy(update={"server_data": server_data}))


def test_the_held_out_perplexity_of_every_client_falls(plain):
    assert [client["name"] for client in plain.summary["clients"]] == ["letters", "digits"]
    for client in plain.summary["clients"]:
        assert client["perplexity_after"] < 0.5 * client["perplexity_before"]
        assert client["perplexity_after_personal"] < client["perplexity_before"]


def test_the_perplexities_are_those_of_the_global_model_on_each_clients_text(plain):
    base = load_graph(plain.config.graph, dtype=torch.float32)
    for node, client in enumerate(plain.summary["clients"]):
        store = ClientStore(client_folder_of(plain.config, node))
        _, _, valid = store.blocks(lambda: pytest.fail("made again"))
        for model, key in (
            (base, "perplexity_before"),
            (plain.federation.global_model.model, "perplexity_after"),
        ):
            loss = evaluate_loss(model, valid.input_ids[:4], valid.labels[:4])
            assert client[key] == pytest.approx(loss.perplexity, rel=1e-5)


def test_every_client_copy_equals_the_servers_model_bit_for_bit_in_every_round(plain):
    assert sorted(plain.copies) == [
        (server_round, node, server_round - 1, server_round - 1, True)
        for server_round in (1, 2, 3, EVALUATION)
        for node in (0, 1)
    ]


def test_graph_hashes_are_equal_on_both_sides(plain):
    expected = plain.federation.global_model.graph.digest()
    assert plain.summary["graph_hash"] == expected
    assert [client["graph_hash"] for client in plain.summary["clients"]] == [expected] * 2
    logged = {row["round"]: row["graph_hash"] for row in plain.rounds}
    for server_round, _, _, reply in plain.grid.sent[:6]:
        assert read_reply(reply.content, [4, 4]).graph_hash == logged[server_round]
    assert len(set(logged.values())) == 3  # every merge edited


def test_merges_stay_within_rho_max_and_are_logged(plain):
    assert sorted(plain.merges) == [1, 2, 3]
    for server_round, merge in plain.merges.items():
        assert set(merge) == {
            "round",
            "rho_max",
            "edits",
            "loss_before",
            "loss_after",
            "gamma_hat",
            "proposed",
        }
        assert (merge["round"], merge["rho_max"]) == (server_round, 3)
        assert 1 <= len(merge["edits"]) <= 3
        assert all(set(edit) == {"op", "layer", "p", "q", "reason"} for edit in merge["edits"])
        drift = abs(merge["loss_after"] - merge["loss_before"])
        assert merge["gamma_hat"] == pytest.approx(drift / len(merge["edits"]))
    assert plain.summary["edits"] == sum(len(merge["edits"]) for merge in plain.merges.values())
    assert plain.federation.global_model.graph.version == 3


def test_the_logged_edits_lead_from_each_rounds_edges_to_the_next(plain):
    masks = [mask.copy() for mask in read_graph(load_graph(plain.config.graph)).masks]
    for row in plain.rounds:
        assert row["edges"] == [int(np.triu(mask, 1).sum()) for mask in masks]
        for edit in plain.merges[row["round"]]["edits"]:
            assert masks[edit["layer"]][edit["p"], edit["q"]] == (edit["op"] == "remove-edge")
            masks[edit["layer"]][edit["p"], edit["q"]] ^= True
    final = plain.federation.global_model.graph.masks
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(masks, final, strict=True))


def test_usage_is_the_average_of_what_the_clients_counted(plain):
    total: list[np.ndarray] = []
    for server_round in (1, 2, 3):
        replies = [
            read_reply(reply.content, [4, 4]) for r, _, _, reply in plain.grid.sent if r == server_round
        ]
        sums = combine_usage([unpack_usage(r.usage, [4, 4]) for r in replies])
        total = [0.5 * old + 0.5 * new for old, new in zip(total, sums, strict=True)] if total else sums
        for edit in plain.merges[server_round]["edits"]:  # an edited pair starts again from its layer's mean
            counts = total[edit["layer"]] = total[edit["layer"]].astype(float)
            counts[edit["p"], edit["q"]] = counts[np.triu_indices(4, 1)].mean()
    assert all(np.allclose(a, b) for a, b in zip(plain.federation.state.usage.counts, total, strict=True))


def test_bytes_are_those_of_all_messages_as_serialized(plain):
    sent = {(r, node): (message_bytes(down), message_bytes(up)) for r, node, down, up in plain.grid.sent}
    for row in plain.rounds:
        for node, client in enumerate(row["clients"][::-1]):  # by name: digits before letters
            assert (client["bytes_down"], client["bytes_up"]) == sent[row["round"], node]
        assert row["bytes_down"] == sum(client["bytes_down"] for client in row["clients"])
        assert row["bytes_up"] == sum(client["bytes_up"] for client in row["clients"])
    totals = [sum(column) for column in zip(*sent.values(), strict=True)]
    assert [plain.summary["bytes_down"], plain.summary["bytes_up"]] == totals
    assert [plain.grid.bytes_down, plain.grid.bytes_up] == totals


def test_dense_bytes_are_all_ffn_weights_in_bf16_each_way(plain):
    dense = 2 * 3 * 32 * 64 * 2 * 2 * 3  # layers, matrices, weights, bytes, clients, rounds
    assert plain.summary["bytes_up_dense"] == plain.summary["bytes_down_dense"] == dense
    assert [row["bytes_up_dense"] for row in plain.rounds] == [dense // 3] * 3
    assert plain.summary["bytes_up"] < dense / 2 and plain.summary["bytes_down"] < dense / 2


def test_each_step_is_sent_once_to_each_client(plain):
    requests = [(r, node, read_request(down.content)) for r, node, down, _ in plain.grid.sent]
    for server_round, _, request in requests:
        assert [step.version for step in request.steps] == ([server_round - 1] if server_round > 1 else [])
        assert request.last == (server_round == 3)


def test_another_run_gives_the_same_result(plain, graph, tmp_path):
    config = plain.config.model_copy(update={"log_dir": str(tmp_path / "logs")})
    again = run(config)
    assert all_equal(again.federation.global_model.model, plain.federation.global_model.model)
    assert {**again.summary, "log_dir": ""} == {**plain.summary, "log_dir": ""}


def without_times(row: dict) -> dict:
    """A line of ``rounds.jsonl`` without what no two runs have in common."""
    return {**row, "seconds": 0, "clients": [{**client, "start_seconds": 0} for client in row["clients"]]}


def test_clients_whose_every_message_meets_a_fresh_process_give_the_same_result(plain, tmp_path):
    config = plain.config.model_copy(update={"log_dir": str(tmp_path / "logs")})
    again = run(config, app=FreshProcessApp())
    assert again.copies == plain.copies
    assert all_equal(again.federation.global_model.model, plain.federation.global_model.model)
    assert [without_times(row) for row in again.rounds] == [without_times(row) for row in plain.rounds]
    assert again.merges == plain.merges


def _cut(folder: Path) -> None:
    state = folder / "global.safetensors"
    state.write_bytes(state.read_bytes()[:-7])


def _remove(folder: Path) -> None:
    shutil.rmtree(folder / "experts")


def _flip(folder: Path) -> None:
    expert = min((folder / "experts").iterdir())
    data = bytearray(expert.read_bytes())
    data[-1] ^= 1
    expert.write_bytes(data)


def _rewrite(folder: Path) -> None:
    """Another expert than the server's, whole in all its files."""
    kept = GlobalCopy(folder)
    model = open_mapped((folder / "graph-path").read_text(), kept)
    version = kept.load(model)
    unit = min(kept._places)
    kept.write(unit, kept.read(unit) * 1.001)
    kept.save(model, version)


@pytest.mark.parametrize("damage", [_cut, _remove, _flip, _rewrite])
def test_a_client_whose_copy_is_damaged_is_healed_by_a_snapshot_in_the_same_round(plain, tmp_path, damage):
    config = plain.config.model_copy(update={"log_dir": str(tmp_path / "logs")})
    done: list[int] = []

    def before(server_round: int, node: int) -> None:
        if (server_round, node) == (3, 0) and not done:
            done.append(1)
            folder = client_folder_of(config, 0)
            (folder / "graph-path").write_text(config.graph)
            damage(folder)

    healed = run(config, before=before)
    assert all_equal(healed.federation.global_model.model, plain.federation.global_model.model)
    assert [client["refused"] for client in healed.rounds[2]["clients"]] == [None, None]
    to_0 = [(down, up) for r, node, down, up in healed.grid.sent if (r, node) == (3, 0)]
    requests = [read_request(down.content) for down, _ in to_0]
    assert [[step.version for step in request.steps] for request in requests] == [[2], []]
    assert [bool(request.snapshot) for request in requests] == [False, True]
    assert (to_0[0][1].error.code, to_0[0][1].error.reason) == (RESEND, "0")
    assert [equal for r, node, _, _, equal in healed.copies if r >= 3 and node == 0][1:] == [True, True]
    # Failed requests count.
    client = next(client for client in healed.rounds[2]["clients"] if client["name"] == "letters")
    assert client["bytes_down"] == sum(message_bytes(down) for down, _ in to_0)
    assert client["bytes_up"] == sum(message_bytes(up) for _, up in to_0)


def test_a_copy_that_cannot_be_healed_is_refused_with_a_reason_and_the_rest_goes_on(graph, tmp_path):
    """A disk on which nothing can be relied upon: whatever is sent, the copy is another."""
    config = tiny_config(graph, tmp_path, local_steps=1)

    def stubborn(message, context):
        if context.node_config["partition-id"] == 0 and message.content["config"]["server-round"] == 2:
            message.content["config"]["copy-hash"] = "f" * 32
        return client_app(message, context)

    seen = run(config, app=stubborn)
    letters = [next(c for c in row["clients"] if c["name"] == "letters") for row in seen.rounds]
    assert letters[0]["refused"] is None and letters[2]["refused"] is None
    assert "expected the copy ffffffffffff of version 1" in letters[1]["refused"]
    assert [c["refused"] for row in seen.rounds for c in row["clients"] if c["name"] == "digits"] == [
        None
    ] * 3


def test_a_client_that_was_away_for_long_comes_back_by_a_snapshot_and_steps_are_dropped(graph, tmp_path):
    everything = {"density": 1.0, "value_bits": 16, "entry_score": "magnitude", "schedule": "constant"}
    config = tiny_config(graph, tmp_path, local_steps=1, num_rounds=9, reply_timeout=0.1, **everything)
    seen = run(config, faults={(0, str(server_round)): Drop() for server_round in range(2, 9)})
    back = next(read_request(d.content) for r, node, d, _ in seen.grid.sent if (r, node) == (9, 0))
    assert back.snapshot and not back.steps
    assert seen.copies[-1][-1] and all(equal for r, node, *_, equal in seen.copies if node == 1)
    # All nodes hold version 8 by then.
    assert [step.version for step in seen.federation.global_model.steps] == [9]


def test_a_sparse_downlink_keeps_both_sides_equal_and_sends_less(plain, tmp_path):
    config = plain.config.model_copy(
        update={"log_dir": str(tmp_path / "logs"), "downlink_density": 0.1, "client_weight": "tokens"}
    )
    sparse = run(config)
    assert all(equal for *_, equal in sparse.copies)
    assert sparse.summary["bytes_down"] < 0.6 * plain.summary["bytes_down"]
    for client in sparse.summary["clients"]:
        assert client["perplexity_after"] < client["perplexity_before"]


def test_low_rank_factors_keep_both_sides_equal(graph, tmp_path):
    config = tiny_config(graph, tmp_path, num_rounds=2, low_rank=True, entry_score="magnitude")
    seen = run(config)
    assert seen.copies and all(equal for *_, equal in seen.copies)
    for client in seen.summary["clients"]:
        assert client["perplexity_after"] < client["perplexity_before"]


@pytest.fixture(scope="module")
def digits_alone(graph, tmp_path_factory) -> Run:
    """Two rounds in which the first client never answers."""
    config = tiny_config(graph, tmp_path_factory.mktemp("alone"), local_steps=1, num_rounds=2)
    return run(config, faults=in_every_round(Error(code=2, reason="away")))


def in_every_round(change):
    """A fault of node 0 in rounds 1 and 2."""
    return {(0, str(server_round)): change for server_round in (1, 2)}


def changed(**records) -> Callable[[Message], Message]:
    """A fault that sets fields of a reply: ``numbers__examples=1e300``."""

    def change(reply: Message) -> Message:
        content = reply.content
        for name, value in records.items():
            record, _, key = name.partition("__")
            if record not in content:
                content[record] = MetricRecord()
            content[record][key.replace("_", "-")] = value
        return Message(content, reply_to=request_of(reply))

    return change


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (changed(numbers__examples=1e300), "expected examples to be a whole number from 1 to"),
        (changed(numbers__examples=float("nan")), "expected examples to be a whole number from 1 to"),
        (
            changed(numbers__train_loss=float("inf")),
            "expected train-loss to be a finite number from 0 to 10000",
        ),
        (changed(numbers__valid_tokens=1.7e308), "expected valid-tokens to be a whole number"),
        (changed(numbers__fun=1.0), "expected numbers among examples,"),
        (changed(info__name="[/red]"), "expected a name of 1 to 96"),
        (changed(info__budget=5), "expected budget to be a whole number from 0 to 4"),
        (changed(info__graph_hash="0" * 64), "expected the graph"),
        (changed(info__version=7), "expected an update of version"),
        (changed(info__partition=-3), "expected partition to be a whole number"),
        (changed(info__partition="one"), "a reply cannot be read"),
        (changed(inclusion__x=0.5), "inclusion probability"),
        (changed(numbers__density=[1.0, 2.0]), "a reply cannot be read"),
    ],
)
def test_a_hostile_client_is_refused_in_every_round_and_the_rest_trains_on(
    graph, digits_alone, tmp_path, fault, reason
):
    config = tiny_config(graph, tmp_path, local_steps=1, num_rounds=2)
    seen = run(config, faults=in_every_round(fault))
    refused = [client["refused"] for row in seen.rounds for client in row["clients"] if client["refused"]]
    assert len(refused) == 2 and all(reason in each for each in refused)
    assert all_equal(seen.federation.global_model.model, digits_alone.federation.global_model.model)


def test_a_lie_about_examples_gives_no_more_than_twice_the_median_weight(graph, tmp_path):
    config = tiny_config(graph, tmp_path, local_steps=1, num_rounds=1, num_clients=3, partition="iid")
    seen = run(config, faults={(0, "1"): changed(numbers__examples=2.0**40)})
    liar, *honest = sorted((client["weight"] for client in seen.rounds[0]["clients"]), reverse=True)
    assert liar == 2 * max(honest) and min(honest) > 0


def test_a_reply_of_an_earlier_round_is_refused_when_it_is_played_again(graph, tmp_path):
    config = tiny_config(graph, tmp_path, local_steps=1)
    kept: list[RecordDict] = []

    def record(reply: Message) -> Message:
        kept.append(copy.deepcopy(reply.content))
        return reply

    def replay(reply: Message) -> Message:
        return Message(copy.deepcopy(kept[0]), reply_to=request_of(reply))

    seen = run(config, faults={(0, "1"): record, (0, "2"): replay, (0, "3"): replay})
    refused = [[client["refused"] for client in row["clients"] if client["refused"]] for row in seen.rounds]
    assert refused[0] == []
    assert refused[1:] == [[f"expected an update of version {v}, got one of version 0"] for v in (1, 2)]


def test_an_update_that_was_changed_on_its_way_is_refused(graph, tmp_path):
    config = tiny_config(graph, tmp_path, local_steps=1, num_rounds=2)

    def tamper(reply: Message) -> Message:
        read = read_reply(reply.content, [4, 4])
        changed = bytearray(read.update)
        changed[len(changed) // 2] ^= 1
        return Message(write_reply(replace(read, update=bytes(changed))), reply_to=request_of(reply))

    seen = run(config, faults={(0, "1"): tamper})
    refused = [[client["refused"] for client in row["clients"] if client["refused"]] for row in seen.rounds]
    assert len(refused[0]) == 1 and "checksum" in refused[0][0]
    assert refused[1] == []


def test_a_node_that_answers_for_another_client_is_refused(graph, tmp_path):
    """The first accepted answer of a client binds it to its node."""
    config = tiny_config(graph, tmp_path, local_steps=1)
    claim = changed(info__partition=1)
    seen = run(config, faults={(0, "2"): claim, (0, "3"): claim})
    refused = [[c["refused"] for c in row["clients"] if c["name"] == "letters"] for row in seen.rounds]
    assert refused == [[None], *[["client 1 has answered already, from another node"]] * 2]
    assert [c["refused"] for row in seen.rounds for c in row["clients"] if c["name"] == "digits"] == [
        None
    ] * 3


def test_a_late_answer_to_an_earlier_round_is_never_looked_at(graph, tmp_path):
    """It stays at the SuperLink: no later exchange pulls its message id."""
    config = tiny_config(graph, tmp_path, local_steps=1, num_rounds=2, reply_timeout=0.1)
    late = run(config, faults={(0, "2"): Late(10**6)})
    never = run(config.model_copy(update={"log_dir": str(tmp_path / "never")}), faults={(0, "2"): Drop()})
    assert all_equal(late.federation.global_model.model, never.federation.global_model.model)
    letters = [next(c for c in row["clients"] if c["name"] == "letters") for row in late.rounds]
    assert [client["refused"] for client in letters] == [None, "no answer within 0 s"]
    assert all(equal for r, *_, equal in late.copies if r == 3)


def corrupted(reply: Message) -> Message:
    """The reply with its last byte of the update changed."""
    content = RecordDict(dict(reply.content.items()))
    array = content["arrays"]["update"]
    array.data = array.data[:-1] + bytes([array.data[-1] ^ 1])
    return Message(content, reply_to=request_of(reply))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Error(code=2, reason="out of memory"), "out of memory"),
        (Drop(), "no answer within 0 s"),
        (corrupted, "checksum mismatch"),
    ],
)
def test_a_client_that_fails_in_a_round_is_left_out_of_it_and_catches_up(graph, tmp_path, fault, reason):
    config = tiny_config(graph, tmp_path, local_steps=1, reply_timeout=0.3)
    seen = run(config, faults={(0, "2"): fault})
    by_name = [{c["name"]: c for c in row["clients"]} for row in seen.rounds]
    assert [row["letters"]["refused"] for row in by_name] == [None, reason, None]
    assert [row["digits"]["refused"] for row in by_name] == [None] * 3
    assert by_name[1]["letters"]["perplexity"] is None and by_name[1]["letters"]["density"] is None
    assert seen.rounds[1]["perplexity"] == pytest.approx(by_name[1]["digits"]["perplexity"])
    request = next(read_request(d.content) for r, node, d, _ in seen.grid.sent if (r, node) == (3, 0))
    assert [step.version for step in request.steps] == ([2] if fault is corrupted else [1, 2])
    assert all(equal for r, _, _, _, equal in seen.copies if r >= 3)
    for client in seen.summary["clients"]:
        assert client["perplexity_after"] < client["perplexity_before"]


def test_with_no_usable_answer_the_run_ends_with_the_reasons(graph, tmp_path):
    config = tiny_config(graph, tmp_path, local_steps=1)
    faults = {(0, "2"): Error(code=2, reason="disk full"), (1, "2"): Error(code=5, reason="gone")}
    with pytest.raises(RuntimeError, match="^no client gave a usable update: disk full; no answer: gone$"):
        run(config, faults=faults)
    assert len((Path(config.log_dir) / "rounds.jsonl").read_text().splitlines()) == 1


def test_bad_input_that_all_clients_report_is_the_users_affair(graph, tmp_path):
    config = tiny_config(graph, tmp_path, local_steps=1)
    grid = TinyGrid(config)
    for context in grid.contexts.values():
        context.node_config["expert-budget"] = 9
    with pytest.raises(UserError, match="^expected a budget from 1 to the graph's 4 experts for client "):
        tiny_federation(grid, config).run()


def test_too_few_clients_are_the_users_affair(graph, tmp_path, monkeypatch):
    monkeypatch.setattr("server.rounds.loop._NODES_TIMEOUT", 0.1)
    config = tiny_config(graph, tmp_path)
    federation = tiny_federation(TinyGrid(config), config.model_copy(update={"num_clients": 3}))
    with pytest.raises(UserError, match="expected 3 connected clients, got 2"):
        federation.run()


def test_budgets_of_all_half_and_a_quarter_in_one_federation(tmp_path, tiny_tokenizer):
    """With sampled experts, weighted by their probabilities, and a merge every other round."""
    graph = save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=8, visits=4)
    changes = {"num_clients": 3, "partition": "iid", "budgets": "8,4,2", "num_rounds": 4, "merge_every": 2}
    method = {"selection": "sample", "combine": "horvitz-thompson", "ship_experts": 2, "value_bits": 8}
    seen = run(tiny_config(graph, tmp_path, **changes, **method))
    assert [client["budget"] for client in seen.summary["clients"]] == [8, 4, 2]
    for _, node, _, reply in (message for message in seen.grid.sent if message[0] <= 4):
        read = read_reply(reply.content, [8, 8])
        assert [int(held.sum()) for held in read.residents] == [[8, 4, 2][node]] * 2
        assert bool(read.inclusion) == (node < 2)  # who ships all it holds draws nothing
    assert sorted(seen.merges) == [2, 4]
    assert all(equal for *_, equal in seen.copies)
    for client in seen.summary["clients"]:
        assert client["perplexity_after"] < client["perplexity_before"]
    mask = np.load(seen.logs / "mask_debug.npy")
    assert mask.shape == (2, 8, 8)


@pytest.mark.parametrize(("value_bits", "combine"), [(16, "mean"), (2, "hajek")])
def test_other_precisions_of_the_wire_keep_both_sides_equal(graph, tmp_path, value_bits, combine):
    config = tiny_config(
        graph, tmp_path, value_bits=value_bits, combine=combine, num_rounds=2, expert_budget=2, rho_max=0
    )
    seen = run(config)
    assert all(equal for *_, equal in seen.copies)
    assert seen.merges == {} and seen.summary["edits"] == 0
    assert seen.federation.global_model.graph.version == 0
    for client in seen.summary["clients"]:
        assert client["perplexity_after"] < client["perplexity_before"]


def test_a_merge_that_costs_too_much_is_not_made(graph, tmp_path, monkeypatch):
    losses = iter([1.0, 2.0] * 2)
    monkeypatch.setattr("server.strategies.rewire.evaluate_loss", lambda *_: LossSum(next(losses), 1))
    config = tiny_config(graph, tmp_path, num_rounds=2, local_steps=1, merge_max_drift=0.5)
    server_data = str(tmp_path / "texts" / "letters.jsonl")
    seen = run(config.model_copy(update={"server_data": server_data}))
    assert [merge["edits"] for merge in seen.merges.values()] == [[], []]
    assert {merge["gamma_hat"] for merge in seen.merges.values()} == {0.5}
    assert seen.summary["edits"] == 0 and seen.federation.global_model.graph.version == 0
    assert all(equal for *_, equal in seen.copies)


def test_a_run_ends_when_the_held_out_loss_stops_falling(graph, tmp_path):
    config = tiny_config(
        graph, tmp_path, num_rounds=5, early_stop_rounds=2, early_stop_delta=100.0, rho_max=0
    )
    seen = run(config)
    assert [row["stopped"] is None for row in seen.rounds] == [True, True, False]
    assert seen.summary["rounds"] == 3 and seen.summary["stopped"] == seen.rounds[-1]["stopped"]
    assert "100" in seen.summary["stopped"]
    assert {server_round for server_round, *_ in seen.grid.sent} == {1, 2, 3, 4}
    for client in seen.summary["clients"]:
        assert client["perplexity_after"] < client["perplexity_before"]
        assert (
            client["perplexity_after_personal"] is None
        )  # no client could know that this was the last round


def test_a_run_ends_when_the_held_out_loss_reaches_its_target(graph, tmp_path):
    seen = run(tiny_config(graph, tmp_path, num_rounds=4, early_stop_loss=100.0, rho_max=0))
    assert seen.summary["rounds"] == 1
    assert seen.summary["stopped"].endswith("nats per token is at most early-stop-loss 100")


def test_a_last_round_without_a_better_loss_is_no_early_stop(graph, tmp_path):
    seen = run(
        tiny_config(graph, tmp_path, num_rounds=2, local_steps=1, early_stop_rounds=1, early_stop_delta=100.0)
    )
    assert seen.summary["stopped"] is None and seen.summary["rounds"] == 2
    assert all(client["perplexity_after_personal"] for client in seen.summary["clients"])


def test_a_warm_up_as_long_as_a_round_still_trains(graph, tmp_path):
    seen = run(tiny_config(graph, tmp_path, num_rounds=2, local_steps=1, warmup_steps=1, rho_max=0))
    first, second = (row["perplexity"] for row in seen.rounds)
    assert second < first
    for client in seen.summary["clients"]:
        assert client["perplexity_after"] < client["perplexity_before"]


def test_routing_alone_can_train(graph, tmp_path):
    seen = run(tiny_config(graph, tmp_path, num_rounds=1, train="routing", rho_max=0, value_bits=16))
    before, after = load_graph(seen.config.graph, dtype=torch.float32), seen.federation.global_model.model
    for old, new in zip(before.expert_layers(), after.expert_layers(), strict=True):
        assert torch.equal(old.gate_up_proj, new.gate_up_proj) and torch.equal(old.down_proj, new.down_proj)
        assert not torch.equal(old.output_gain, new.output_gain)


def test_the_first_mask_lies_within_the_budget(graph, tmp_path):
    seen = run(tiny_config(graph, tmp_path, num_rounds=1, local_steps=1, expert_budget=2))
    mask = np.load(seen.logs / "mask_debug.npy")
    assert mask.dtype == bool and mask.shape == (2, 4, 4)
    assert np.array_equal(mask, np.triu(mask))
    touched = (mask.any(1) | mask.any(2)).sum(1)
    assert (touched <= 2).all() and mask.any()
    first = next(read_reply(reply.content, [4, 4]) for _, node, _, reply in seen.grid.sent if node == 0)
    expected = read_graph(load_graph(seen.config.graph)).restrict(first.residents).masks
    assert np.array_equal(mask, np.stack(expected))


def test_nothing_but_logs_and_clients_files_is_left(plain):
    assert sorted(os.listdir(plain.logs)) == [
        "clients",
        "mask_debug.npy",
        *(f"merge_round{number}.json" for number in (1, 2, 3)),
        "pack_sizes.txt",
        "rounds.jsonl",
        "summary.json",
        "tensorboard",
    ]


def test_clients_of_very_different_size_train_one_graph_together(graph, tmp_path):
    """Budgets E, E/2 and E/4 in one federation."""
    config = tiny_config(graph, tmp_path, num_clients=3, budgets="4,2,1", partition="iid")
    result = run(config)
    assert [client["budget"] for client in result.summary["clients"]] == [4, 2, 1]
    assert all(equal for *_, equal in result.copies)
    for client in result.summary["clients"]:
        assert client["perplexity_after"] < client["perplexity_before"]
    for _, _, _, reply in result.grid.sent:
        held = read_reply(reply.content, [4, 4]).residents
        assert [int(bits.sum()) for bits in held] in ([4, 4], [2, 2], [1, 1], [])


def test_4_bit_clients_with_lora_on_experts_and_attention_train_the_graph(graph, tmp_path):
    config = tiny_config(
        graph,
        tmp_path,
        num_rounds=2,
        budgets="4,2",
        weights="nf4",
        lora_rank=4,
        attention_lora=True,
        learning_rate=0.03,
    )
    result = run(config)
    assert all(equal for *_, equal in result.copies)
    base, global_model = load_graph(config.graph, dtype=torch.float32), result.federation.global_model.model
    for layer in (0, 1):
        assert not torch.equal(read_attention(base, layer), read_attention(global_model, layer))
    for client in result.summary["clients"]:
        assert client["perplexity_after"] < client["perplexity_before"]


def test_attention_that_nobody_asked_for_is_refused(graph, tmp_path):
    """A client that trains attention on its own account does not touch the model."""
    config = tiny_config(graph, tmp_path, num_rounds=1, lora_rank=2)

    def rogue(message, context):
        context.run_config["attention-lora"] = context.node_config["partition-id"] == 1
        return client_app(message, context)

    result = run(config, app=rogue)
    (row,) = result.rounds
    refused = {client["name"]: client["refused"] for client in row["clients"]}
    assert refused["letters"] is None
    assert len([reason for reason in refused.values() if reason]) == 1
    base, global_model = load_graph(config.graph, dtype=torch.float32), result.federation.global_model.model
    assert torch.equal(read_attention(base, 0), read_attention(global_model, 0))


class Halved:
    """A wrapper of a strategy that halves the combined change and counts the calls."""

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner
        self.calls: Counter[str] = Counter()

    def configure(self, global_model, session, server_round):
        self.calls["configure"] += 1
        return self.inner.configure(global_model, session, server_round)

    def accept(self, node, reply, packed, global_model):
        self.calls["accept"] += 1
        if reply.name == "digits":
            raise RefusedUpdate("digits are not trusted")
        return self.inner.accept(node, reply, packed, global_model)

    def combine(self, accepted, global_model):
        self.calls["combine"] += 1
        return {unit: 0.5 * vector for unit, vector in self.inner.combine(accepted, global_model).items()}

    def combine_usage(self, accepted, global_model):
        self.calls["combine_usage"] += 1
        return self.inner.combine_usage(accepted, global_model)

    def after_round(self, global_model, state):
        self.calls["after_round"] += 1
        return self.inner.after_round(global_model, state)


def test_a_wrapper_of_the_strategy_decides_what_is_accepted_and_applied(graph, tmp_path):
    """The change of the first round is half of SAM-v2's over the same single client."""
    exact = {"value_bits": 16, "density": 1.0, "entry_score": "magnitude"}
    config = tiny_config(graph, tmp_path, num_rounds=1, local_steps=1, rho_max=0, **exact)
    plain = tiny_federation(TinyGrid(config, faults={(1, "1"): Error(code=2, reason="away")}), config)
    plain.run()
    config = config.model_copy(update={"log_dir": str(tmp_path / "halved")})
    wrapper = Halved(sam_v2(config))
    halved = tiny_federation(TinyGrid(config), config, strategy=wrapper)
    halved.run()
    assert wrapper.calls == {"configure": 4, "accept": 2, "combine": 1, "combine_usage": 1, "after_round": 1}
    base = load_graph(config.graph, dtype=torch.float32).expert_layers()[0].down_proj
    full, half = (
        (each.global_model.model.expert_layers()[0].down_proj - base).detach() for each in (plain, halved)
    )
    assert full.abs().max() > 1e-4
    assert torch.allclose(half, full / 2, atol=1e-3 * float(full.abs().max()))
