"""Perplexity after pruning experts by REAP, by routing frequency and at random, and after merging them.

Measured on a small MoE, grown on a trained Llama and trained on all domains once per seed, and on a bootstrapped graph.
Experts are chosen on training text; perplexity is that of held-out text of all domains, without training in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.support.expert_removal import Text, compare
from benchmarks.support.material import bootstrapped, data_sources, mixed_blocks, model_path
from benchmarks.support.quality.settings import DOMAINS
from benchmarks.support.runner import Measured, OnStep, measured_apart, run_benchmark
from benchmarks.support.saliency_tools import tool_figures
from benchmarks.support.small_moe import grow, train_moe
from benchmarks.support.statistics import interval
from federated.data.blocks import Blocks
from models.runtime.perplexity import IGNORED
from models.runtime.precision import autocast_to_bf16


@dataclass(frozen=True)
class Settings:
    """Amounts of training and measurement.

    Attributes:
        domains: domains of the text; wikimix is added.
        experts: E of the MoE.
        graph_experts: E of the graph.
        top_k: experts per token of the MoE.
        neurons: neurons of an expert of the MoE.
        train_blocks: training blocks per domain.
        calibration_blocks: blocks per domain for saliency and merging.
        valid_blocks: held-out blocks per domain.
        block_size: tokens per block.
        batch_size: blocks per optimizer step.
        steps: optimizer steps.
        learning_rate: peak learning rate.
        seeds: seeds of the initial experts, the order of the text, and the random choice of experts.
        calibration_tokens: tokens sampled from the model for the bootstrap of the graph.
        peak_shape: hidden size, neurons of an expert and layers of the checkpoint whose pruning is measured.
        repeats: repetitions of timings.
    """

    domains: Sequence[str]
    experts: int
    graph_experts: int
    top_k: int
    neurons: int
    train_blocks: int
    calibration_blocks: int
    valid_blocks: int
    block_size: int
    batch_size: int
    steps: int
    learning_rate: float
    seeds: Sequence[int]
    calibration_tokens: int
    peak_shape: tuple[int, int, int]
    repeats: int


FULL = Settings(DOMAINS, 32, 16, 4, 64, 400, 16, 24, 128, 16, 120, 2e-3, (1, 2, 3), 8192, (1024, 2048, 10), 7)
QUICK = replace(
    FULL,
    domains=("a",),
    experts=4,
    graph_experts=4,
    top_k=2,
    neurons=8,
    train_blocks=4,
    calibration_blocks=2,
    valid_blocks=2,
    block_size=32,
    batch_size=2,
    steps=2,
    seeds=(1, 2),
    calibration_tokens=256,
    peak_shape=(64, 64, 2),
    repeats=2,
)


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Perplexities after every removal of experts; relative time of saliency collection, peak memory of pruning."""
    settings = QUICK if quick else FULL
    path, steps = model_path("mix7M", quick=quick), len(settings.seeds) * 2 + 1
    found: dict[str, list[dict[str, Any]]] = {"mixture": [], "graph": []}
    tools: dict[str, float] = {}
    for number, seed in enumerate(settings.seeds):
        text = read_text(settings, seed, quick)
        moe = grow(path, experts=settings.experts, top_k=settings.top_k, neurons=settings.neurons, seed=seed)
        train_moe(
            moe,
            text.train,
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            autocast=autocast_to_bf16("auto", "cpu"),
            seed=seed,
        )
        found["mixture"].append(compare(moe, text, seed))
        on_step("models", 2 * number + 1, steps)
        graph = bootstrapped(path, settings.graph_experts, settings.calibration_tokens)
        found["graph"].append(compare(graph, text, seed))
        on_step("models", 2 * number + 2, steps)
        if not tools:
            tools = tool_figures(moe, text.calibration, settings.repeats)
    peak = prune_peak(settings.peak_shape)
    on_step("models", steps, steps)
    return _measured(settings, found, tools, peak)


def read_text(settings: Settings, seed: int, quick: bool) -> Text:
    """Read the text of all domains, documents in an order of ``seed``."""
    path = model_path("mix7M", quick=quick)
    sources = [*data_sources(settings.domains, quick=quick), "wikimix"]

    def blocks(split: str, count: int) -> Blocks:
        size = settings.block_size
        return mixed_blocks(sources, path, split=split, block_size=size, max_blocks=count, seed=seed)

    calibration = blocks("train", settings.calibration_blocks)
    batches = zip(
        calibration.input_ids.split(settings.batch_size),
        (calibration.labels != IGNORED).split(settings.batch_size),
        strict=True,
    )
    return Text(blocks("train", settings.train_blocks), list(batches), blocks("valid", settings.valid_blocks))


def prune_peak(shape: tuple[int, int, int]) -> dict[str, float]:
    """Peak memory of pruning half of the experts of a random MoE checkpoint, see ``measure_pruning``."""
    width, neurons, layers = shape
    config = MixtralConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=neurons, num_hidden_layers=layers, num_local_experts=16,
        num_attention_heads=8, num_key_value_heads=8, dtype=torch.bfloat16,
    )  # fmt: skip
    with TemporaryDirectory(prefix="fedgraft-") as folder:
        source, out = Path(folder) / "moe", Path(folder) / "pruned"
        MixtralForCausalLM(config).bfloat16().save_pretrained(source)
        return measured_apart("prune_peak", [str(source), str(out), "8"])


def _ratio_of(found: Sequence[Mapping[str, Any]], share: str, one: str, other: str) -> list[float]:
    return [each[share][one] / each[share][other] for each in found]


def _measured(
    settings: Settings,
    found: dict[str, list[dict[str, Any]]],
    tools: dict[str, float],
    peak: dict[str, float],
) -> Measured:
    pairs = {
        "ppl_frequency_over_reap_50": ("half", "freq", "reap"),
        "ppl_random_over_reap_50": ("half", "random", "reap"),
        "ppl_prune_over_merge_25": ("quarter", "reap", "merge"),
    }
    intervals = {
        kind: {name: interval(_ratio_of(runs, *pair)) for name, pair in pairs.items()}
        for kind, runs in found.items()
    }
    figures: dict[str, float | None] = {name: low for name, (low, _) in intervals["mixture"].items()}
    figures |= tools | {"prune_peak_over_checkpoint": peak["peak_bytes"] / peak["bytes_before"]}
    notes = dict.fromkeys(pairs, "lower end of the 95 % interval over seeds")
    notes["reap_formula_difference"] = "largest absolute difference over the largest value"
    return Measured(
        figures=figures,
        peers={"intervals": intervals, "runs": found, "pruned_on_disk": peak, "setting": vars(settings)},
        notes=notes,
    )


if __name__ == "__main__":
    run_benchmark("prune_merge", measure)
