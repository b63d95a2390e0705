from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Error, RecordDict

from configs.errors import UserError
from configs.paths import graph_or_default
from configs.schema import RunConfig
from models.checkpoints.load import load_causal_lm, load_graph, load_tokenizer
from models.graph.graph_state import read_graph
from server import app as server_app
from server.app import main, open_global_model, run_federation, server_text
from server.flower.in_process_grid import RUN_ID
from server.reporting.unused_clients import UnusedClients
from server.state.run_lock import SERVER_LOCK, holding
from tests.support.tiny_federation import TinyGrid, tiny_config

LOGS = {
    "mask_debug.npy", "expert_call_trace.json", "merge_round1.json", "cluster_stats.txt", "pack_sizes.txt",
    "rounds.jsonl", "summary.json", "tensorboard", "checkpoints", "clients", "state",
}  # fmt: skip


@pytest.fixture
def config(tiny_graph_dir, tmp_path) -> RunConfig:
    return tiny_config(tiny_graph_dir, tmp_path, num_rounds=1, local_steps=1, rho_max=3, checkpoint_every=1)


def with_(config: RunConfig, **changes) -> RunConfig:
    return config.model_copy(update=changes)


def test_a_run_leaves_logs_and_a_checkpoint_that_is_the_servers_model(config, tmp_path, monkeypatch):
    servers = []
    monkeypatch.setattr(
        server_app, "open_global_model", lambda c: servers.append(open_global_model(c)) or servers[0]
    )
    config = with_(config, out=str(tmp_path / "out"))
    summary = run_federation(TinyGrid(config), config, run_id=RUN_ID)
    assert {path.name for path in Path(config.log_dir).iterdir()} == LOGS
    assert summary == json.loads((Path(config.log_dir) / "summary.json").read_text())
    assert (summary["out"], summary["rounds"]) == (config.out, 1)
    (global_model,) = servers
    loaded, source = load_graph(config.out), load_graph(config.graph)
    assert read_graph(loaded).digest() == summary["graph_hash"] == global_model.graph.digest()
    for name, value in global_model.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(loaded.state_dict()[name].dtype))
    assert loaded.dtype == source.dtype
    assert load_tokenizer(config.out)("the")["input_ids"] == load_tokenizer(config.graph)("the")["input_ids"]
    changed = [n for n, v in source.state_dict().items() if not torch.equal(v, loaded.state_dict()[n])]
    assert changed and all(".mlp." in name for name in changed)


def test_the_trace_is_that_of_the_final_model_on_sampled_text_or_the_servers(config, tmp_path):
    run_federation(TinyGrid(config), config, run_id=RUN_ID)
    path = Path(config.log_dir) / "expert_call_trace.json"
    entries = json.loads(path.read_text())
    assert len(entries) == 6 * 2  # trace-tokens, layers
    assert all(len(entry["experts"]) == len(entry["weights"]) == 2 for entry in entries)
    with_text = with_(config, server_data=str(tmp_path / "texts" / "digits.jsonl"), trace_tokens=3)
    run_federation(TinyGrid(with_text), with_text, run_id=RUN_ID)
    assert len(json.loads(path.read_text())) == 3 * 2
    none = with_(config, trace_tokens=0)
    run_federation(TinyGrid(none), none, run_id=RUN_ID)
    assert json.loads(path.read_text()) == []


def test_a_client_without_a_usable_update_fails_the_run_after_its_model_is_saved(config, tmp_path):
    config = with_(config, out=str(tmp_path / "out"))
    context = Context(
        run_id=RUN_ID, node_id=0, node_config={}, state=RecordDict(), run_config=config.values()
    )
    with pytest.raises(UnusedClients, match="none of letters: disk full; the model without them is in"):
        main(TinyGrid(config, faults={(0, "1"): Error(code=2, reason="disk full")}), context)
    read_graph(load_graph(config.out))
    summary = json.loads((Path(config.log_dir) / "summary.json").read_text())
    assert sorted(str(client["refused"]) for client in summary["clients"]) == ["None", "disk full"]
    assert json.loads((Path(config.log_dir) / "failure.json").read_text())["type"] == "UnusedClients"


def test_the_server_app_reads_its_configuration_from_flower(config):
    context = Context(
        run_id=RUN_ID, node_id=0, node_config={}, state=RecordDict(), run_config=config.values()
    )
    main(TinyGrid(config), context)
    assert (Path(config.log_dir) / "summary.json").is_file()
    context.run_config["rho"] = 1
    with pytest.raises(UserError, match="rho-max"):
        main(TinyGrid(config), context)
    assert "rho-max" in json.loads((Path(config.log_dir) / "failure.json").read_text())["message"]


def test_logs_without_a_folder_go_to_the_users_cache(config, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDGRAFT_CACHE", str(tmp_path / "cache"))
    config = with_(config, log_dir="")
    summary = run_federation(TinyGrid(config), config, run_id=77)
    assert summary["log_dir"] == str(tmp_path / "cache" / "runs" / "77")
    assert (tmp_path / "cache" / "runs" / "77" / "rounds.jsonl").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"graph": "/no/such/graph"}, "/no/such/graph"),
        ({"expert_budget": 5}, "expected budgets to be at most the graph's 4 experts"),
        ({"experts_per_token": 5}, "expected experts-per-token to be at most the graph's 4 experts"),
        ({"block_size": 129}, "expected block-size to be at most the graph's 128 tokens"),
        ({"server_data": "/no/such/text.txt"}, "/no/such/text.txt"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(config, changes, words):
    config = with_(config, **changes)
    with pytest.raises(UserError, match=words):
        run_federation(TinyGrid(config), config, run_id=RUN_ID)
    assert not Path(config.log_dir).exists()


def test_an_output_folder_with_files_is_kept_unless_told_otherwise(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    config = with_(config, out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="overwrite"):
        run_federation(TinyGrid(config), config, run_id=RUN_ID)
    assert not Path(config.log_dir).exists() and (tmp_path / "out" / "precious").exists()
    config = with_(config, overwrite=True)
    run_federation(TinyGrid(config), config, run_id=RUN_ID)
    assert load_causal_lm(config.out) is not None and not (tmp_path / "out" / "precious").exists()


def test_a_dense_model_is_no_graph(config, tiny_llama_dir):
    with pytest.raises(UserError, match="expected an expert graph, got a model of type 'llama'"):
        open_global_model(with_(config, graph=str(tiny_llama_dir)))


def test_without_a_named_graph_the_quick_starts_is_taken(config, tiny_graph_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDGRAFT_CACHE", str(tmp_path / "cache"))
    unnamed = with_(config, graph="")
    with pytest.raises(UserError, match="quickstart.sh"):
        graph_or_default(unnamed.graph)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "graph").symlink_to(tiny_graph_dir)
    assert graph_or_default(unnamed.graph) == str(tmp_path / "cache" / "graph")
    assert graph_or_default(config.graph) == str(tiny_graph_dir)
    # The clients find it as well.
    run_federation(TinyGrid(unnamed), unnamed, run_id=RUN_ID)


def test_walk_and_visits_of_the_run_are_set(config):
    global_model = open_global_model(with_(config, walk="depth-first", experts_per_token=3))
    assert {(layer.order, layer.num_visits) for layer in global_model.model.expert_layers()} == {
        ("depth-first", 3)
    }


def test_the_servers_text_is_the_held_out_part_of_its_sources(config, tmp_path):
    global_model = open_global_model(config)
    assert server_text(config, global_model) is None
    rows = [json.dumps({"text": "ab" if number < 18 else "xyz"}) for number in range(20)]
    (tmp_path / "own.jsonl").write_text("\n".join(rows))
    blocks = server_text(with_(config, server_data=str(tmp_path / "own.jsonl")), global_model)
    words = global_model.tokenizer("xyz")["input_ids"]
    assert blocks.input_ids[0, :8].tolist() == [0, *words, 0, *words]
    assert blocks.num_tokens == 8


def test_without_a_block_size_blocks_are_as_long_as_the_smaller_context(config, tmp_path):
    config = with_(config, block_size=0, server_data=config.data, log_dir=str(tmp_path / "default"))
    summary = run_federation(TinyGrid(config), config, run_id=RUN_ID)
    named = with_(config, block_size=128, log_dir=str(tmp_path / "named"))
    expected = run_federation(TinyGrid(named), named, run_id=RUN_ID)
    assert summary["clients"] == expected["clients"]
    assert load_graph(config.graph).config.max_position_embeddings == 128


def test_a_run_on_answers_counts_the_tokens_of_answers_alone(config, tmp_path):
    sources = []
    for name in ("sums", "words"):
        rows = [{"prompt": f"{name} {number}", "completion": "yes"} for number in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        sources.append(str(tmp_path / f"{name}.jsonl"))
    config = with_(config, data=";".join(sources), server_data=sources[0], loss_on="answers")
    blocks = server_text(config, open_global_model(config))
    assert blocks.num_tokens == 2 * len("yes") + 2, "two held-out answers, each with EOS"
    summary = run_federation(TinyGrid(config), config, run_id=RUN_ID)
    assert [client["perplexity_after"] > 1 for client in summary["clients"]] == [True, True]


def test_a_log_directory_in_use_is_refused_and_nothing_is_written_there(config):
    context = Context(
        run_id=RUN_ID, node_id=0, node_config={}, state=RecordDict(), run_config=config.values()
    )
    logs = Path(config.log_dir)
    with holding(logs, SERVER_LOCK), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        main(TinyGrid(config), context)
    assert list(logs.iterdir()) == []
    main(TinyGrid(config), context)
    assert not (logs / SERVER_LOCK).exists()
