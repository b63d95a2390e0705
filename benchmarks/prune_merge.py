"""Which experts can go? Pruning by REAP, by frequency, at random, and merging, on mixtures trained here and a graph.

A small mixture is grown on a trained Llama and trained on all domains, once per seed. What is kept is chosen on
training text; perplexity is measured on held-out text of all domains, with no training after the experts went.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from benchmarks.support.material import bootstrapped, data_sources, domain_blocks, model_path
from benchmarks.support.quality_runs import DOMAINS
from benchmarks.support.runner import Measured, OnStep, measured_apart, run_benchmark
from benchmarks.support.saliency_tools import tool_figures
from benchmarks.support.small_moe import grow, train_moe
from benchmarks.support.statistics import interval
from experts.saliency.measures import METRICS, Saliency
from experts.selection.rules import SelectionRules, select_experts
from federated.data.blocks import Blocks
from models.moe.merge import Batch, MergeOptions, merge_experts
from models.moe.remove import keep_experts
from models.moe.saliency_collection import collect_saliency
from models.runtime.perplexity import IGNORED, evaluate_loss
from models.runtime.precision import autocast_to_bf16

# How merging is done, beside the default.
PLANS = {
    "merge": MergeOptions(),
    "merge, average similarity": MergeOptions(similarity="average"),
    "merge, REAM": MergeOptions(weights="mean-saliency", refit=False),
    "merge, REAM by all tokens, refitted": MergeOptions(weights="saliency"),
    "merge, plain average": MergeOptions(alignment="none", weights="plain", refit=False),
}
RANDOM_DRAWS = 3


@dataclass(frozen=True)
class Settings:
    """How much is trained and measured.

    Attributes:
        domains: of the text; wikimix is one more.
        experts: E of the mixture.
        graph_experts: E of the graph.
        top_k: experts per token of the mixture.
        neurons: of an expert of the mixture.
        train_blocks: of a domain.
        calibration_blocks: of a domain, for saliency and merging.
        valid_blocks: of a domain.
        block_size: tokens of a block.
        batch_size: blocks.
        steps: of training.
        learning_rate: at its highest.
        seeds: of the experts, the order of the text, and random experts.
        calibration_tokens: sampled from the model, for the bootstrap of the graph.
        peak_shape: width, neurons of an expert and layers of the mixture that is pruned on the disk.
        repeats: of timings.
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


@dataclass(frozen=True)
class Text:
    """Blocks of all domains together."""

    train: Blocks
    calibration: list[Batch]
    valid: Blocks


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Perplexities of every way to lose a quarter and a half of the experts; time and memory of the tools."""
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
    """Text of all domains, documents in an order of ``seed``."""
    path = model_path("mix7M", quick=quick)
    sources = [*data_sources(settings.domains, quick=quick), "wikimix"]

    def blocks(split: str, count: int) -> Blocks:
        size = settings.block_size
        each = [
            domain_blocks(source, path, split=split, block_size=size, max_blocks=count, seed=seed)
            for source in sources
        ]
        return Blocks(torch.cat([b.input_ids for b in each]), torch.cat([b.labels for b in each]))

    calibration = blocks("train", settings.calibration_blocks)
    batches = zip(
        calibration.input_ids.split(settings.batch_size),
        (calibration.labels != IGNORED).split(settings.batch_size),
        strict=True,
    )
    return Text(blocks("train", settings.train_blocks), list(batches), blocks("valid", settings.valid_blocks))


def compare(model: PreTrainedModel, text: Text, seed: int) -> dict[str, Any]:
    """Perplexity with all experts, and of every way to lose a quarter and a half of them."""
    saliency = collect_saliency(model, text.calibration)
    rng = np.random.default_rng(seed)
    result: dict[str, Any] = {"all": perplexity(model, text)}
    for share, name in ((4, "quarter"), (2, "half")):
        kept = {metric: kept_by(saliency, metric, share) for metric in METRICS}
        arms = {metric: pruned_perplexity(model, text, keep_map) for metric, keep_map in kept.items()}
        draws = [
            pruned_perplexity(model, text, random_experts(saliency, share, rng)) for _ in range(RANDOM_DRAWS)
        ]
        arms["random"] = math.exp(fmean(map(math.log, draws)))
        for plan_name, plan in PLANS.items():
            merged = copy.deepcopy(model)
            merge_experts(merged, text.calibration, kept["reap"], plan)
            arms[plan_name] = perplexity(merged, text)
        result[name] = arms
    return result


def kept_by(saliency: Saliency, metric: str, share: int) -> dict[int, np.ndarray]:
    """The experts that stay when one in ``share`` of each layer goes."""
    return select_experts([saliency], metric, SelectionRules(n_prune=saliency.num_experts // share)).keep_map


def random_experts(saliency: Saliency, share: int, rng: np.random.Generator) -> dict[int, np.ndarray]:
    """As many experts of each layer, drawn at random."""
    return {
        layer: np.sort(rng.permutation(count)[: count - count // share])
        for layer, count in enumerate(saliency.experts_per_layer)
    }


def perplexity(model: PreTrainedModel, text: Text) -> float:
    """On the held-out text, weighted by tokens."""
    return evaluate_loss(model, text.valid.input_ids, text.valid.labels).perplexity


def pruned_perplexity(model: PreTrainedModel, text: Text, keep_map: Mapping[int, np.ndarray]) -> float:
    """Without all other experts."""
    return perplexity(keep_experts(copy.deepcopy(model), keep_map), text)


def prune_peak(shape: tuple[int, int, int]) -> dict[str, float]:
    """Memory that pruning half of the experts of a random mixture takes on the disk."""
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
    note = "lower end of the 95 % interval over seeds"
    return Measured(
        figures=figures,
        peers={"intervals": intervals, "runs": found, "pruned_on_disk": peak, "setting": vars(settings)},
        notes=dict.fromkeys(pairs, note) | {"reap_formula_difference": "relative to the largest"},
    )


if __name__ == "__main__":
    run_benchmark("prune_merge", measure)
