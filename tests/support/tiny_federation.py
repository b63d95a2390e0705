"""A federation small enough for a test: graphs of width 32, two clients with a few short texts, fp32, few steps."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from transformers import PreTrainedTokenizerBase

from clients.client_app import app as client_app
from configs.node_config import NodeConfig, load_node_config
from configs.schema import RunConfig, load_run_config
from federated.protocol.messages import Request
from federated.protocol.steps import ServerStep
from federated.updates.update import SparseUpdate, SparseVector, Unit
from federated.wire.codec import pack_update
from federated.wire.quantize import quantize_update
from models.bootstrap.recipe import graph_fingerprint
from models.checkpoints.disk_experts import materialize
from models.checkpoints.load import load_graph
from models.checkpoints.save import save_checkpoint
from models.graph.graph_state import read_graph
from models.graph.unit_vectors import unit_sizes
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from server.app import open_global_model, server_text
from server.flower.in_process_grid import RUN_ID, Fault, InProcessGrid
from server.rounds.loop import Federation
from server.rounds.run_observer import RunObserver
from server.strategies.sam_v2 import sam_v2
from server.strategies.strategy import Strategy
from tests.support.documents import write_documents
from tests.support.tiny_graphs import graph_of

# Each client repeats itself, so that a few steps of training show.
TEXTS = {"letters": "the red fox ran to the hen. ", "digits": "12 + 34 = 46; 21 + 43 = 64; "}


def save_tiny_graph(directory: Path, tokenizer: PreTrainedTokenizerBase, **plan: Any) -> Path:
    """Write a graph of the tiny Llama (``num_experts``, ``visits`` and so on as ``graph_of`` takes them)."""
    directory.mkdir(parents=True)
    save_checkpoint(graph_of(**plan), tokenizer, directory)
    return directory


def write_texts(folder: Path, names: Sequence[str] = tuple(TEXTS)) -> str:
    """One file of 18 training and 2 held-out documents per name; returns the data sources of a run configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        texts = [TEXTS[name][start:] + TEXTS[name] * 5 for start in range(20)]
        write_documents(folder / f"{name}.jsonl", texts)
    return ";".join(str(folder / f"{name}.jsonl") for name in names)


def run_values(graph: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Run configuration of the tiny federation; ``folder`` receives texts and logs, ``changes`` are in snake case."""
    values = {
        "graph": str(graph),
        "data": write_texts(folder / "texts"),
        "log_dir": str(folder / "logs"),
        "num_clients": 2,
        "num_rounds": 3,
        "local_steps": 4,
        "batch_size": 4,
        "block_size": 32,
        "learning_rate": 0.01,
        "density": 0.5,
        "precision": "fp32",
        "assembler_steps": 2,
        "eval_blocks": 4,
        "reply_timeout": 0.5,
        "trace_tokens": 6,
        "rho_max": 2,
        **changes,
    }
    return {key.replace("_", "-"): value for key, value in values.items()}


def node_configs(count: int = 2) -> list[dict[str, int]]:
    """Node configurations as Flower's simulation gives them."""
    return [{"partition-id": partition, "num-partitions": count} for partition in range(count)]


def node_of(values: Mapping[str, Any] | None = None, *, partition: int = 0) -> NodeConfig:
    """The validated configuration of a node with hyphenated ``values``."""
    return load_node_config({"partition-id": partition, **(values or {})})


def node_context(partition: int = 0, **node: Any) -> Context:
    """The Flower context of one of two nodes; ``node`` is its node configuration, in snake case."""
    own = {key.replace("_", "-"): value for key, value in node.items()}
    node_config = {"partition-id": partition, "num-partitions": 2} | own
    return Context(run_id=RUN_ID, node_id=5, node_config=node_config, state=RecordDict(), run_config={})


def request_at(graph: Path, model: FedGraftForCausalLM, version: int = 0, **changes: Any) -> Request:
    """A request that finds ``model``, which came from folder ``graph``, at ``version``."""
    facts = {"graph_hash": read_graph(model).digest(), "base_fingerprint": graph_fingerprint(str(graph))}
    return Request(**{"server_round": 1, "version": version, **facts, **changes})


def in_memory(model: FedGraftForCausalLM) -> FedGraftForCausalLM:
    """A copy of a model whose experts are on disk, with all of them in memory."""
    held = copy.deepcopy(model)
    materialize(held, [None] * len(held.expert_layers()))
    return held


class TinyGrid(InProcessGrid):
    """An in-process grid for ``config`` that remembers the messages and can be watched.

    Attributes:
        sent: ``(round, node index, request, reply or None)`` of every message, in order.
        after: called with ``(round, node index)`` when a client has answered.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        faults: Mapping[tuple[int, str], Fault] | None = None,
        app: Any = client_app,
    ) -> None:
        super().__init__(app, node_configs(config.num_clients), config.values(), faults=faults)
        self.sent: list[tuple[int, int, Message, Message | None]] = []
        self.before: Callable[[int, int], None] = lambda server_round, node: None
        self.after: Callable[[int, int], None] = lambda server_round, node: None

    def _deliver(self, message: Message) -> str:
        node = self.node_ids.index(message.metadata.dst_node_id)
        server_round = int(message.metadata.group_id)
        self.before(server_round, node)
        message_id = super()._deliver(message)
        self.sent.append((server_round, node, message, self._replies.get(message_id)))
        self.after(server_round, node)
        return message_id


def tiny_federation(grid: TinyGrid, config: RunConfig, *, strategy: Strategy | None = None) -> Federation:
    """The parts of ``server.app.run_federation``, so that a test can look at them while it runs.

    ``strategy``: None for SAM-v2.
    """
    global_model = open_global_model(config)
    observer = RunObserver(Path(config.log_dir), global_model=global_model)
    strategy = strategy or sam_v2(config, validation=server_text(config, global_model))
    return Federation(
        grid=grid, config=config, global_model=global_model, strategy=strategy, observer=observer
    )


def request_of(reply: Message) -> Message:
    """A message that another reply may answer in the place of ``reply``."""
    message = Message(
        RecordDict({}), dst_node_id=reply.metadata.src_node_id, message_type="train", group_id="2"
    )
    message.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return message


def tiny_config(graph: Path, folder: Path, **changes: Any) -> RunConfig:
    """``run_values``, validated."""
    return load_run_config(run_values(graph, folder, **changes))


def client_folder_of(config: RunConfig, node: int) -> Path:
    """Where a client of an in-process run keeps its files."""
    return Path(config.log_dir) / "clients" / f"run-{RUN_ID}" / f"client-{node}"


def random_change(
    model: FedGraftForCausalLM, units: Sequence[Unit] | None = None, *, seed: int = 0, scale: float = 0.01
) -> dict[Unit, torch.Tensor]:
    """A random change ``[size]`` of the units named, or of all."""
    generator = torch.Generator().manual_seed(seed)
    sizes = unit_sizes(model)
    return {unit: torch.randn(sizes[unit], generator=generator) * scale for unit in units or sizes}


def packed_change(
    model: FedGraftForCausalLM, change: Mapping[Unit, torch.Tensor], *, value_bits: int = 4
) -> bytes:
    """A change of the model's experts, packed for its present graph."""
    graph = read_graph(model)
    vectors = {
        unit: SparseVector.from_dense(vector.numpy(), vector.numpy() != 0) for unit, vector in change.items()
    }
    update = quantize_update(SparseUpdate(graph.version, graph.digest(), vectors), value_bits)
    return pack_update(update, value_bits=value_bits)


def next_step(model: FedGraftForCausalLM, version: int, **options: Any) -> ServerStep:
    """A step of random changes from the model's present graph."""
    return ServerStep(version, packed_change(model, random_change(model, seed=version)), **options)


def all_equal(one: FedGraftForCausalLM, other: FedGraftForCausalLM) -> bool:
    """Whether all parameters, buffers and the graphs of two models are equal bit for bit, wherever experts lie."""
    left, right = in_memory(one).state_dict(), in_memory(other).state_dict()
    same = left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    return same and read_graph(one).digest() == read_graph(other).digest()


def assert_run_succeeded(summary: dict[str, Any], *, logs: Path, out: Path, names: Sequence[str]) -> None:
    """A run went well, by its summary, its logs and its checkpoint."""
    assert set(summary) == {
        "rounds", "stopped", "clients", "bytes_up", "bytes_down", "bytes_up_dense", "bytes_down_dense", "edits",
        "drift_rounds", "last", "best", "epsilon", "delta", "graph_hash", "out", "log_dir", "log_errors",
    }  # fmt: skip
    assert (summary["out"], summary["log_dir"], summary["log_errors"]) == (str(out), str(logs), {})
    assert [client["name"] for client in summary["clients"]] == list(names)
    for client in summary["clients"]:
        assert set(client) == {
            "name", "budget", "perplexity_before", "perplexity_after", "perplexity_after_personal", "graph_hash",
            "drift_rounds", "refused",
        }  # fmt: skip
        assert client["refused"] is None
        assert client["perplexity_after"] < client["perplexity_before"]
        assert client["graph_hash"] == summary["graph_hash"]
    assert summary["last"]["round"] == summary["rounds"]
    assert summary["best"] == summary["last"] | {"out": str(out)}  # each round is better than the one before
    rounds = [json.loads(line) for line in (logs / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rounds] == list(range(1, summary["rounds"] + 1))
    assert summary["bytes_up"] > sum(row["bytes_up"] for row in rounds) > 0
    merges = [json.loads((logs / f"merge_round{row['round']}.json").read_text()) for row in rounds]
    assert summary["edits"] == sum(len(merge["edits"]) for merge in merges) >= 1
    for name in ("mask_debug.npy", "expert_call_trace.json", "pack_sizes.txt", "flower.log", "superlink.log"):
        assert (logs / name).stat().st_size > 0
    assert list((logs / "tensorboard").glob("events.*"))
    assert read_graph(load_graph(str(out))).digest() == summary["graph_hash"]
