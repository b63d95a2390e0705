"""Perplexity of graphs that are bootstrapped layer by layer, by model, text mix, seed and selection of neurons."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.support.material import REAL_MODEL, data_sources, mixed_blocks, model_path
from benchmarks.support.runner import commit
from benchmarks.support.stored import stored
from models.bootstrap.build import BootstrapOptions, build_graph, plan_experts
from models.bootstrap.selection_report import SHARES, active_count
from models.checkpoints.load import load_dense
from models.graph.runtime_settings import visiting
from models.runtime.perplexity import evaluate_loss

MIXES: dict[str, tuple[str, ...]] = {
    "questions and law": ("math_gsm8k", "medical_qa", "law_dc", "recipes"),
    "prose and code": ("shakespeare", "stories", "code_algos", "dolly_shepherd"),
}
MIXES["all"] = (*MIXES["questions and law"], *MIXES["prose and code"])
SELECTIONS = ("dense", "router", "static")


@dataclass(frozen=True)
class Amounts:
    """Options of the bootstrap, and blocks of text.

    Attributes:
        options: options of the bootstrap.
        block_size: tokens per block.
        calibration_blocks: blocks of calibration text, of training documents.
        held_out_blocks: blocks of held-out text, of validation documents.
    """

    options: BootstrapOptions
    block_size: int = 256
    calibration_blocks: int = 96
    held_out_blocks: int = 16


# Experts of 6 and 8 neurons, and the options that the command takes where none are given.
FULL = {
    REAL_MODEL: Amounts(BootstrapOptions.of_router(256, hidden_size=576)),
    "mix7M": Amounts(BootstrapOptions.of_router(128, hidden_size=256)),
}
QUICK = {name: Amounts(BootstrapOptions.of_router(16, hidden_size=192), 64, 8, 4) for name in FULL}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        model: name of the dense model.
        mix: name of the text mix, of ``MIXES``.
        seed: seed of the order of documents and of k-means.
        selection: ``router``, ``static`` (a fixed set of as many neurons with the same default output), or ``dense``.
    """

    model: str
    mix: str
    seed: int
    selection: str


def stored_perplexities(case: Case, quick: bool, folder: Path) -> dict[str, float]:
    """``perplexities`` of a case, read from ``folder`` where this commit has measured it."""
    torch.set_num_threads(1)
    amounts = (QUICK if quick else FULL)[case.model]
    facts = {"case": asdict(case), "amounts": asdict(amounts), "quick": quick, "commit": commit()}
    return stored(folder, facts, lambda: perplexities(case, amounts, quick))


def perplexities(case: Case, amounts: Amounts, quick: bool) -> dict[str, float]:
    """Held-out perplexity by share of active experts in percent, and ``seconds`` of the plan.

    The dense model has one at 100 percent, a static selection one at 50, for which its default output is fitted.
    """
    dense = load_dense(model_path(case.model, quick=quick)).float()
    held_out = _text(case, "valid", amounts.held_out_blocks, amounts.block_size, quick)
    if case.selection == "dense":
        return {"100": evaluate_loss(dense, *held_out).perplexity}
    options = replace(amounts.options, seed=case.seed)
    if case.selection == "static":
        options = replace(options, num_shared=options.visits)
    text = _text(case, "train", amounts.calibration_blocks, amounts.block_size, quick)[0]
    started = time.perf_counter()
    experts = plan_experts(dense, text, options)
    seconds = time.perf_counter() - started
    graph = build_graph(dense, experts, options.visits, consume=True)
    found = {}
    for share in SHARES if case.selection == "router" else (50,):
        with visiting(graph, [active_count(options.num_experts, share)] * len(experts)):
            found[str(share)] = evaluate_loss(graph, *held_out).perplexity
    return {**found, "seconds": seconds}


def _text(case: Case, split: str, blocks: int, block_size: int, quick: bool) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``labels`` of equally many blocks of every domain of the mix, each ``[N, S]``."""
    domains = MIXES[case.mix]
    text = mixed_blocks(
        data_sources(domains, quick=quick),
        model_path(case.model, quick=quick),
        split=split,
        block_size=block_size,
        max_blocks=max(1, blocks // len(domains)),
        seed=case.seed,
    )
    return text.input_ids, text.labels


def cases(models: Sequence[str], texts: Sequence[tuple[str, int]]) -> list[Case]:
    """Cases of every model on every text, a mix and a seed, in the order of the texts."""
    return [
        Case(model, mix, seed, selection)
        for mix, seed in texts
        for model in models
        for selection in SELECTIONS
    ]


def ratios(found: Sequence[tuple[Case, dict[str, float]]], model: str) -> dict[str, list[float]]:
    """Ratios of perplexities of one model, by figure: a value per mix and seed.

    Args:
        found: cases and their ``perplexities``.
        model: name of the model.
    """
    by_text: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    for case, values in found:
        if case.model == model:
            by_text.setdefault((case.mix, case.seed), {})[case.selection] = values
    over_dense = {
        f"ppl_{share}_over_dense": [
            each["router"][str(share)] / each["dense"]["100"] for each in by_text.values()
        ]
        for share in SHARES
    }
    static = [each["static"]["50"] / each["router"]["50"] for each in by_text.values()]
    return {**over_dense, "static_over_router_50": static}
