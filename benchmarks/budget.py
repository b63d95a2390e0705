"""Peak memory and training time of a client with a quarter of the experts, relative to one with all of them.

Each client is a process of its own that answers one training request: it evaluates the graph, chooses its residents
with the assembler, loads them, trains and packs its update.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.support.material import DEMO_MODEL
from benchmarks.support.runner import Measured, OnStep, measured_apart, run_benchmark
from models.checkpoints.load import load_tokenizer
from models.checkpoints.save import save_checkpoint
from models.remote_code.configuration_fedgraft import FedGraftConfig
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

EXPERTS = 16


def write_random_graph(directory: Path, *, hidden_size: int, ffn_size: int, layers: int) -> float:
    """Write a graph of random weights with the demo model's tokenizer; returns the size of its weights in GB."""
    tokenizer = load_tokenizer(str(DEMO_MODEL))
    config = FedGraftConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=ffn_size,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        num_experts=[EXPERTS] * layers,
        expert_size=ffn_size // EXPERTS,
        experts_per_token=EXPERTS // 2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = FedGraftForCausalLM(config)
    for layer in model.expert_layers():
        later = torch.arange(EXPERTS)[None] - torch.arange(EXPERTS)[:, None]
        layer.edges.copy_((later >= 0) & (later <= 4))
    save_checkpoint(model, tokenizer, directory)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e9


def run_client(graph: Path, budget: int, folder: Path, steps: int, settings: dict) -> dict[str, float]:
    """Measure one client in a process of its own, see ``benchmarks.support.budget_client``."""
    return measured_apart(
        "budget_client", [str(graph), str(budget), str(folder), str(steps), json.dumps(settings)]
    )


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Memory and time at budgets E and E/4, interleaved and repeated."""
    shape = (
        {"hidden_size": 64, "ffn_size": 256, "layers": 2}
        if quick
        else {"hidden_size": 1024, "ffn_size": 4096, "layers": 16}
    )
    repeats, steps = (1, 2) if quick else (3, 3)
    settings = {
        "local-steps": 2, "batch-size": 2, "block-size": 64 if quick else 256, "eval-blocks": 2, "assembler-steps": 2,
        "num-threads": 1 if quick else 2, "train-documents": 50,
    }  # fmt: skip
    measured: dict[int, list[dict[str, float]]] = {EXPERTS: [], EXPERTS // 4: []}
    with tempfile.TemporaryDirectory(prefix="fedgraft-") as scratch:
        graph = Path(scratch) / "graph"
        graph.mkdir()
        gigabytes = write_random_graph(graph, **shape)
        for repeat in range(repeats):
            for position, budget in enumerate(measured):
                folder = Path(scratch) / f"{budget}-{repeat}"
                measured[budget].append(run_client(graph, budget, folder, steps, settings))
                on_step("clients", repeat * 2 + position + 1, repeats * 2)

    def ratio(key: str) -> float:
        quarters, wholes = measured[EXPERTS // 4], measured[EXPERTS]
        return statistics.median(a[key] / b[key] for a, b in zip(quarters, wholes, strict=True))

    medians = {
        f"budget {budget}": {key: statistics.median(each[key] for each in runs) for key in runs[0]}
        for budget, runs in measured.items()
    }
    return Measured(
        figures={"rss_ratio_quarter": ratio("peak_mib"), "step_ratio_quarter": ratio("step_seconds")},
        peers={"gigabytes_of_weights": gigabytes, **medians, "settings": settings},
        notes={"rss_ratio_quarter": "peak memory of a whole round minus that of imports and data"},
    )


if __name__ == "__main__":
    run_benchmark("budget", measure)
