from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.schema import RunConfig
from federated.aggregation.usage import pack_usage
from federated.protocol.messages import Reply, read_reply, write_reply
from federated.protocol.steps import step_stats
from federated.wire.codec import packed_stats
from server.model.global_model import GlobalModel
from server.reporting.run_log import RewireRecord
from server.reporting.summary import read_summary
from server.rounds.exchange import Answer
from server.rounds.run_observer import RunObserver
from server.rounds.validation import check_evaluations, check_replies
from server.state.client_drift import ClientDrift
from server.state.drift import Drift
from server.state.run_history import RunHistory
from server.strategies.sam_v2 import sam_v2
from tests.support.tiny_federation import packed_change, random_change, save_tiny_graph

NUMBERS = {"examples": 3.0, "train-loss": 1.5, "density": 0.5, "valid-nll": 20.0, "valid-tokens": 10.0}
CLIENT_KEYS = {
    "name",
    "budget",
    "perplexity_before",
    "perplexity_after",
    "perplexity_after_personal",
    "graph_hash",
    "drift_rounds",
    "refused",
}


@pytest.fixture(scope="module")
def graph(tmp_path_factory, tiny_tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("observer") / "graph"
    save_tiny_graph(directory, tiny_tokenizer, num_experts=4, visits=2)
    (directory / "cluster_stats.txt").write_text("how well the clusters separate\n")
    return directory


@pytest.fixture
def global_model(graph) -> GlobalModel:
    return GlobalModel(str(graph))


@pytest.fixture
def log_dir(tmp_path) -> Path:
    return tmp_path / "logs"


@pytest.fixture
def observer(global_model, log_dir) -> RunObserver:
    return RunObserver(log_dir, global_model=global_model)


def answer_of(global_model: GlobalModel, partition: int, numbers: dict | None = None, **changes) -> Answer:
    """A good answer of a client to a round; it holds experts 0 and 2 of the first layer and 3 of the second."""
    reply = Reply(
        name=f"client-{partition}",
        partition=partition,
        budget=2,
        version=global_model.version,
        graph_hash=global_model.graph.digest(),
        numbers=NUMBERS | (numbers or {}),
        update=packed_change(
            global_model.model, half_of(random_change(global_model.model, [(0, 0), (0, 2)]))
        ),
        usage=pack_usage([np.eye(4, dtype=np.int64)] * 2),
        residents=[np.array([1, 0, 1, 0], dtype=bool), np.array([0, 0, 0, 1], dtype=bool)],
    )
    return Answer(write_reply(replace(reply, **changes)), "", None, 10 + partition, 20 + partition)


def half_of(change: dict) -> dict:
    """The change with alternate entries zero: a density of 0.5 over an even number of equal units."""
    return {
        unit: vector * ((torch.arange(len(vector)) + index) % 2)
        for index, (unit, vector) in enumerate(change.items())
    }


def finish(observer: RunObserver, global_model: GlobalModel, answers: dict[int, Answer]) -> None:
    """Validate and write the final evaluation."""
    observer.finish(check_evaluations(answers, global_model, {}), answers)


def evaluated(global_model: GlobalModel, partition: int, nll: float, **changes) -> Answer:
    """A good answer to the final evaluation."""
    numbers = {"valid-nll": nll, "valid-tokens": 10.0}
    reply = Reply(
        f"client-{partition}", partition, 2, global_model.version, global_model.graph.digest(), numbers
    )
    return Answer(write_reply(replace(reply, **changes)), "", None, 1, 2)


def observe(
    observer: RunObserver,
    global_model: GlobalModel,
    answers: dict[int, Answer],
    server_round: int = 1,
    **facts,
) -> dict:
    """Write a round and return its line."""
    usage = [np.ones((4, 4))] * 2
    replies = check_replies(answers, global_model, sam_v2(RunConfig()))
    observer.round(
        server_round, replies, answers, graph=global_model.graph, usage=usage, seconds=1.5, **facts
    )
    return json.loads((observer.log_dir / "rounds.jsonl").read_text().splitlines()[-1])


def test_a_round_is_a_line(observer, global_model):
    row = observe(
        observer,
        global_model,
        {5: answer_of(global_model, 1, {"valid-nll": 40.0}), 9: answer_of(global_model, 0)},
    )
    assert (row["round"], row["seconds"], row["train_loss"], row["density"]) == (1, 1.5, 1.5, 0.5)
    assert (row["bytes_up"], row["bytes_down"]) == (21, 41)
    assert row["bytes_up_dense"] == row["bytes_down_dense"] == 2 * global_model.dense_bytes()
    assert row["perplexity"] == pytest.approx(math.exp(60 / 20))
    assert (row["edges"], row["graph_hash"]) == (
        global_model.graph.edges_per_layer(),
        global_model.graph.digest(),
    )
    assert [client["name"] for client in row["clients"]] == ["client-0", "client-1"]
    first = row["clients"][0]
    assert (first["budget"], first["weight"], first["bytes_up"], first["bytes_down"]) == (2, 3.0, 10, 20)
    assert (first["perplexity"], first["refused"]) == (pytest.approx(math.exp(2)), None)
    packed = read_reply(answer_of(global_model, 0).content, [4, 4]).update
    stats = packed_stats(packed)
    assert (first["update_bytes"], first["update_floor_bytes"]) == (len(packed), stats.entropy_floor_bytes)
    assert (row["step_bytes"], row["step_floor_bytes"]) == (None, None)  # the server has made no step


def test_the_servers_step_has_its_sizes_beside_the_clients(global_model, log_dir):
    stepped = GlobalModel(global_model.source)
    stepped.advance(random_change(stepped.model, [(0, 2)]), value_bits=4)
    row = observe(RunObserver(log_dir, global_model=stepped), stepped, {9: answer_of(stepped, 0)})
    stats = step_stats(stepped.steps[-1])
    assert (row["step_bytes"], row["step_floor_bytes"]) == (stats.packed_bytes, stats.entropy_floor_bytes)
    table = [line.split() for line in (log_dir / "pack_sizes.txt").read_text().splitlines()]
    assert [line[1] for line in table] == ["client", "client-0", "server"]
    assert [int(table[2][column]) for column in (3, 5)] == [stats.packed_bytes, stats.entropy_floor_bytes]


def test_a_client_weighs_what_the_aggregation_says(observer, global_model):
    answers = {9: answer_of(global_model, 0, {"train-tokens": 77.0})}
    replies = check_replies(answers, global_model, sam_v2(RunConfig(client_weight="tokens")))
    facts = {"graph": global_model.graph, "usage": [np.ones((4, 4))] * 2, "seconds": 1.0}
    observer.round(1, replies, answers, **facts)
    row = json.loads((observer.log_dir / "rounds.jsonl").read_text())
    assert row["clients"][0]["weight"] == 77.0


def test_a_refused_client_has_a_reason_and_a_name_once_it_is_known(observer, global_model):
    bad = Answer(None, "disk full", None, 9, 30)
    row = observe(observer, global_model, {5: bad, 9: answer_of(global_model, 0)})
    assert [(client["name"], client["refused"]) for client in row["clients"]] == [
        ("client-0", None),
        ("node-5", "disk full"),
    ]
    assert row["clients"][1] | {"name": 0, "refused": 0, "bytes_up": 9, "bytes_down": 30} == {
        "name": 0, "budget": 0, "weight": 0.0, "train_loss": None, "perplexity": None, "bytes_up": 9,
        "bytes_down": 30, "density": None, "refused": 0, "update_bytes": None, "update_floor_bytes": None,
        "drift_loss": None, "drift_routing": None, "drifted": False, "start_seconds": None,
    }  # fmt: skip
    assert (row["bytes_up"], row["bytes_down"]) == (19, 50)
    observe(observer, global_model, {5: answer_of(global_model, 1), 9: answer_of(global_model, 0)}, 2)
    row = observe(observer, global_model, {5: bad, 9: answer_of(global_model, 0)}, 3)
    assert [client["name"] for client in row["clients"]] == ["client-0", "client-1"]


def test_the_first_mask_is_the_first_clients_and_is_written_once(observer, global_model, log_dir):
    observe(observer, global_model, {5: answer_of(global_model, 1), 9: answer_of(global_model, 0)})
    mask = np.load(log_dir / "mask_debug.npy")
    held = np.zeros((2, 4), dtype=bool)
    held[0, [0, 2]] = held[1, 3] = True
    expected = np.stack(global_model.graph.masks) & held[:, :, None] & held[:, None, :]
    assert np.array_equal(mask, expected)
    (log_dir / "mask_debug.npy").unlink()
    observe(observer, global_model, {9: answer_of(global_model, 0)}, 2)
    assert not (log_dir / "mask_debug.npy").exists()


def test_the_summary_takes_everything_together(observer, global_model, log_dir):
    for server_round in (1, 2):
        personal = {"personal-nll": 5.0, "personal-tokens": 10.0} if server_round == 2 else {}
        numbers = {"valid-nll": 20.0 / server_round, **personal}
        answers = {5: answer_of(global_model, 1, numbers), 9: answer_of(global_model, 0, numbers, budget=0)}
        observe(observer, global_model, answers, server_round)
    edit = {"op": "add-edge", "layer": 0, "p": 0, "q": 1, "reason": ""}
    observer.rewire(RewireRecord(1, 4, [edit] * 3))
    observer.rewire(RewireRecord(2, 4, [edit]))
    answers = {5: evaluated(global_model, 1, 4.0), 9: evaluated(global_model, 0, 3.0)}
    evaluations = check_evaluations(answers, global_model, {})
    last = evaluations.accepted[1]
    evaluations.accepted[1] = replace(last, reply=replace(last.reply, graph_hash="ab"))
    observer.finish(evaluations, answers)
    summary = observer.close(out="/some/where", best={"round": 1})
    assert summary == read_summary(log_dir)
    assert set(summary) == {
        "rounds", "stopped", "clients", "bytes_up", "bytes_down", "bytes_up_dense", "bytes_down_dense", "edits",
        "drift_rounds", "last", "best", "epsilon", "delta", "graph_hash", "out", "log_dir", "log_errors",
    }  # fmt: skip
    assert (summary["rounds"], summary["edits"], summary["out"]) == (2, 4, "/some/where")
    assert summary["stopped"] is None and summary["best"] == {"round": 1}
    assert summary["last"] == {"round": 2, "perplexity": pytest.approx(math.exp(7 / 20))}
    assert (summary["bytes_up"], summary["bytes_down"]) == (2 * 21 + 2, 2 * 41 + 4)
    assert summary["bytes_up_dense"] == 4 * global_model.dense_bytes()
    assert summary["graph_hash"] == global_model.graph.digest() and summary["log_dir"] == str(log_dir)
    first, second = summary["clients"]
    assert set(first) == set(second) == CLIENT_KEYS
    assert (first["name"], first["budget"], first["graph_hash"]) == ("client-0", 4, "ab")
    assert (second["name"], second["budget"]) == ("client-1", 2)
    assert first["perplexity_before"] == pytest.approx(math.exp(2.0))  # of the first round
    assert first["perplexity_after"] == pytest.approx(math.exp(0.3))
    assert first["perplexity_after_personal"] == pytest.approx(math.exp(0.5))


def test_rounds_of_drift_are_in_the_summary(observer, global_model):
    answers = {5: answer_of(global_model, 1), 9: answer_of(global_model, 0)}
    detectors = {0: ClientDrift(1), 1: ClientDrift(1, 4.0, 0.5, drifted=True)}
    for server_round, overall in ((1, False), (2, True)):
        observe(observer, global_model, answers, server_round, drift=Drift(detectors, overall, [1]))
    summary = observer.close(out="")
    assert summary["drift_rounds"] == [2]
    assert [each["drift_rounds"] for each in summary["clients"]] == [[], [1, 2]]


def test_a_run_that_stops_early_says_why_and_counts_the_rounds_done(observer, global_model):
    answers = {9: answer_of(global_model, 0)}
    assert observe(observer, global_model, answers)["stopped"] is None
    assert observe(observer, global_model, answers, 2, stopped="no better")["stopped"] == "no better"
    finish(observer, global_model, {9: evaluated(global_model, 0, 3.0)})
    summary = observer.close(out="", stopped="no better")
    assert (summary["rounds"], summary["stopped"]) == (2, "no better")
    assert summary["clients"][0]["perplexity_after_personal"] is None


def test_a_client_whose_every_update_was_refused_is_in_the_summary_with_its_last_reason(
    observer, global_model
):
    good, away = answer_of(global_model, 0), Answer(None, "away", None, 0, 30)
    full = Answer(None, "disk full", None, 9, 30)
    once = answer_of(global_model, 2)
    observe(observer, global_model, {3: full, 5: full, 7: once, 9: good})
    observe(observer, global_model, {3: away, 5: full, 7: away, 9: good}, 2)
    finish(observer, global_model, {5: evaluated(global_model, 1, 4.0), 9: evaluated(global_model, 0, 3.0)})
    clients = observer.close(out="")["clients"]
    assert [(client["name"], client["refused"]) for client in clients] == [
        ("client-0", None), ("client-1", "disk full"), ("client-2", None), ("node-3", "away"),
    ]  # fmt: skip
    assert all(set(client) == CLIENT_KEYS for client in clients)
    assert clients[1]["perplexity_after"] == pytest.approx(math.exp(0.4))
    unknown = dict.fromkeys(CLIENT_KEYS) | {"name": "node-3", "refused": "away", "drift_rounds": []}
    assert clients[3] == unknown


def test_an_answer_to_the_evaluation_that_is_no_good_is_left_out(observer, global_model):
    observe(observer, global_model, {5: answer_of(global_model, 1), 9: answer_of(global_model, 0)})
    nan = evaluated(global_model, 1, float("nan"))
    finish(observer, global_model, {5: nan, 9: Answer(None, "no answer", None, 0, 2)})
    clients = observer.close(out="")["clients"]
    assert [client["perplexity_after"] for client in clients] == [None, None]


def test_a_perplexity_beyond_all_numbers_is_null(observer, global_model, log_dir):
    row = observe(observer, global_model, {9: answer_of(global_model, 0, {"valid-nll": 1e5})})
    assert row["perplexity"] is None and row["clients"][0]["perplexity"] is None
    finish(observer, global_model, {9: evaluated(global_model, 0, 1e5)})
    observer.close(out="")
    text = (log_dir / "summary.json").read_text()
    client = json.loads(text, parse_constant=lambda name: pytest.fail(name))["clients"][0]
    assert (client["perplexity_before"], client["perplexity_after"]) == (None, None)


def test_curves_text_pictures_and_histograms_reach_tensorboard(observer, global_model, log_dir):
    for server_round in (1, 2):
        observe(
            observer,
            global_model,
            {5: answer_of(global_model, 1), 9: answer_of(global_model, 0)},
            server_round,
        )
    observer.rewire(RewireRecord(2, 4, [{"op": "add-edge", "layer": 0, "p": 0, "q": 1, "reason": ""}]))
    finish(observer, global_model, {5: evaluated(global_model, 1, 4.0), 9: evaluated(global_model, 0, 3.0)})
    observer.close(out="")
    events = EventAccumulator(str(log_dir / "tensorboard")).Reload()
    tags = events.Tags()
    curve = events.Scalars("perplexity/client-0")
    assert [event.step for event in curve] == [1, 2, 3]
    assert curve[-1].value == pytest.approx(math.exp(0.3))
    assert events.Scalars("perplexity/overall")[-1].value == pytest.approx(math.exp(0.35))
    wanted = {"loss/overall", "loss/client-1", "bytes/up", "bytes/down", "density/client-0", "edges/layer_00"}
    assert wanted <= set(tags["scalars"])
    assert {"masks/global", "masks/client-0", "masks/client-1", "usage/traversals"} <= set(tags["images"])
    assert {"tokens_per_expert/layer_00", "tokens_per_expert/layer_01"} <= set(tags["histograms"])
    assert "graph/edits/text_summary" in tags["tensors"]


def test_a_new_run_replaces_the_files_of_an_earlier_one_and_no_others(global_model, log_dir):
    log_dir.mkdir()
    stale = ["rounds.jsonl", "summary.json", "merge_round7.json", "tensorboard/old", "checkpoints/round-1/x"]
    for name in [*stale, "flower.log"]:
        (log_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (log_dir / name).write_text("{}")
    RunObserver(log_dir, global_model=global_model)
    assert not any((log_dir / name).exists() for name in stale)
    assert (log_dir / "flower.log").read_text() == "{}"
    assert (log_dir / "cluster_stats.txt").read_text() == "how well the clusters separate\n"


def test_an_observer_goes_on_from_the_history_of_an_earlier_one(observer, global_model, log_dir):
    answers = {index: answer_of(global_model, index) for index in (0, 1)}
    observe(observer, global_model, answers)
    history = RunHistory.from_json(json.loads(json.dumps(observer.history.to_json())))
    again = RunObserver(log_dir, global_model=global_model, history=history)
    summaries = []
    for each in (observer, again):
        observe(each, global_model, answers, server_round=2)
        summaries.append(each.close(out=""))
    assert summaries[0] == summaries[1] and summaries[1]["rounds"] == 2
    events = EventAccumulator(str(log_dir / "tensorboard")).Reload()
    sent = [event.value for event in events.Scalars("bytes_cumulative/up")]
    assert sent[-1] == summaries[1]["bytes_up"] == 2 * sent[0]


def test_traffic_outside_of_completed_rounds_counts_in_the_summary(observer, global_model):
    observe(observer, global_model, {9: answer_of(global_model, 0)})
    observer.add_traffic({5: Answer(None, "gone", None, 3, 4), 9: Answer(None, "gone", None, 0, 4)})
    summary = observer.close(out="")
    assert (summary["bytes_up"], summary["bytes_down"]) == (10 + 3, 20 + 8)


def test_the_trace_is_written(observer, log_dir):
    entry = {"sequence": 0, "layer": 0, "token": 0, "experts": [1], "parents": [-1], "weights": [1.0]}
    observer.trace([entry])
    assert json.loads((log_dir / "expert_call_trace.json").read_text()) == [entry]
