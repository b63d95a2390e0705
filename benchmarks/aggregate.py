"""Peak memory and time of the server's aggregation for 64 clients relative to 2, packed updates and dense FedAvg.

Each measurement is a server process that loads the global model, receives the replies of one round, checks them,
aggregates them and packs its step.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.budget import write_random_graph
from benchmarks.support.material import model_path
from benchmarks.support.runner import Measured, OnStep, measured_apart, run_benchmark
from federated.updates.update import SparseUpdate, SparseVector
from federated.wire.codec import pack_update
from federated.wire.quantize import quantize_update
from models.bootstrap.build import BootstrapOptions, build_graph, plan_experts
from models.checkpoints.load import load_dense, load_graph, load_tokenizer
from models.checkpoints.save import save_checkpoint
from models.graph.graph_state import read_graph
from models.graph.unit_vectors import unit_sizes
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

FEW, MANY = 2, 64
METHODS = ("packed", "dense")
DENSITIES = (0.05, 0.5)  # at the latter, all packed replies together are far larger than the model
VALUE_BITS = 4


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Peak memory and seconds of both methods with 2 and with 64 clients, interleaved and repeated."""
    many, repeats = (8, 1) if quick else (MANY, 3)
    peers: dict = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="fedgraft-") as scratch:
        graph = Path(scratch) / "graph"
        model = write_tiny_graph(graph) if quick else write_graph(model_path("mix7M"), graph)
        for density in DENSITIES[:1] if quick else DENSITIES:
            replies = Path(scratch) / f"replies-{density}"
            packed_bytes = write_replies(model, replies, clients=many, density=density)
            runs: dict[tuple[str, int], list[dict[str, float]]]
            runs = {(method, clients): [] for method in METHODS for clients in (FEW, many)}
            for repeat in range(repeats):
                for number, (method, clients) in enumerate(runs):
                    runs[method, clients].append(run_server(graph, replies, clients, method))
                    on_step(f"density {density}", repeat * len(runs) + number + 1, repeats * len(runs))
            found = {
                f"{method}, {clients} clients": {
                    key: statistics.median(run[key] for run in each) for key in each[0]
                }
                for (method, clients), each in runs.items()
            }
            for method in METHODS:
                ratios[f"{method} {density}"] = statistics.median(
                    a["peak_mib"] / b["peak_mib"]
                    for a, b in zip(runs[method, many], runs[method, FEW], strict=True)
                )
            peers[f"density {density}"] = {
                **found,
                "packed_mib_of_all_replies": packed_bytes / 2**20,
                "rss_ratio_dense": ratios[f"dense {density}"],
                "rss_ratio_packed": ratios[f"packed {density}"],
            }
    weights = sum(parameter.numel() for parameter in model.parameters())
    peers["settings"] = {
        "model_mib_fp32": 4 * weights / 2**20,
        "shipped_entries_of_all": sum(unit_sizes(model).values()),
        "value_bits": VALUE_BITS,
        "clients": [FEW, many],
    }
    return Measured(
        figures={"rss_ratio_64_over_2": max(ratios[name] for name in ratios if name.startswith("packed"))},
        peers=peers,
        notes={
            "rss_ratio_64_over_2": "peak memory of the server process in a round minus that of imports, "
            "maximum over two densities"
        },
    )


def write_graph(source: str, directory: Path) -> FedGraftForCausalLM:
    """Write the Llama of folder ``source`` as a graph of 16 experts per layer, calibrated on random tokens."""
    dense = load_dense(source).float()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(dense.config.vocab_size, (4, 128), generator=generator)
    model = build_graph(dense, plan_experts(dense, ids, BootstrapOptions(num_experts=16, jobs=1)), 8)
    directory.mkdir()
    save_checkpoint(model, load_tokenizer(source), directory)
    return model


def write_tiny_graph(directory: Path) -> FedGraftForCausalLM:
    """Write a small graph of random weights."""
    directory.mkdir()
    write_random_graph(directory, hidden_size=64, ffn_size=256, layers=2)
    return load_graph(str(directory))


def write_replies(model: FedGraftForCausalLM, folder: Path, *, clients: int, density: float) -> int:
    """Write one packed update per client with random entries of all experts; returns their total bytes."""
    folder.mkdir()
    graph, sizes, total = read_graph(model), unit_sizes(model), 0
    for client in range(clients):
        random = np.random.default_rng(client)
        vectors = {}
        for unit, size in sizes.items():
            kept = np.flatnonzero(random.random(size) < density)
            vectors[unit] = SparseVector(size, kept, random.standard_normal(kept.size) * 1e-3)
        update = quantize_update(SparseUpdate(graph.version, graph.digest(), vectors), VALUE_BITS)
        packed = pack_update(update, value_bits=VALUE_BITS)
        (folder / f"{client:03}.update").write_bytes(packed)
        total += len(packed)
    return total


def run_server(graph: Path, replies: Path, clients: int, method: str) -> dict[str, float]:
    """Measure one server in a process of its own, see ``benchmarks.support.aggregate_server``."""
    return measured_apart("aggregate_server", [str(graph), str(replies), str(clients), method])


if __name__ == "__main__":
    run_benchmark("aggregate", measure)
