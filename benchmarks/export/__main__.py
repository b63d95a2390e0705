"""Deviation of exported mixtures of experts from their expert graph, and decoding speed of a GGUF file.

SmolLM2-135M-Instruct and a Llama of 7 M parameters (``small``) are bootstrapped with half of the experts active, shared
experts among them, and no default outputs, which no format can hold. ``kl`` is the mean divergence of the export from
the graph in nats per token of held-out text of eight domains, everything in fp32; ``kl_bf16`` is that of the graph
itself with matrix products in bf16. ``ppl_ratio_worst`` is the largest perplexity of an export over that of its graph.
``gguf_f32_logprob_difference`` is the largest difference of a log-probability between llama.cpp, which opens the GGUF
file in fp32, and transformers, after texts of eight tokens: their median, since now and then rounding decides a
near-tie of two experts otherwise. ``gguf_dense_f32_logprob_difference`` is the largest one of dense models, which
choose nothing. ``tokens_per_second_gguf_over_dense_gguf`` compares the Qwen2-MoE of SmolLM2 with its dense model, both
GGUF files in fp16 under llama.cpp with one thread.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.export.conversions import Amounts, Material, exports, material, probes, rounding
from benchmarks.export.runtime import log_probability_differences, opened, speed_ratios
from benchmarks.support.material import REAL_MODEL, model_path
from benchmarks.support.runner import Measured, OnStep, run_benchmark
from configs.choices import ExportedWeights, ExportFormat
from models.checkpoints.load import load_tokenizer
from models.export.dense import dense_model
from models.export.pipeline import Export

FULL = {REAL_MODEL: Amounts(8), "mix7M": Amounts(16)}
QUICK = {"mix7M": Amounts(8, block_size=64, calibration=2, choice=2, held_out=1)}
_NAMES = {
    ExportFormat.MIXTRAL: "kl_mixtral",
    ExportFormat.QWEN2_MOE: "kl_qwen2moe",
    ExportFormat.GRANITE_MOE: "kl_granite",
}
# Formats that llama.cpp opens.
_IN_GGUF = (ExportFormat.MIXTRAL, ExportFormat.QWEN2_MOE)
_REPETITIONS, _TOKENS = 5, 64
# Texts of the comparison with llama.cpp, and their length in tokens.
_TEXTS, _LENGTH = 16, 8


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Measure deviations of all formats and the speed of one.

    Args:
        quick: use the embedded model and little text.
        on_step: called with the stage, the number of steps done and their total.
    """
    torch.set_num_threads(1)
    figures: dict[str, float | None] = {}
    peers: dict[str, Any] = {}
    differences: list[float] = []
    dense: list[float] = []
    worst: list[float] = []
    for name, amounts in (QUICK if quick else FULL).items():
        prefix = "" if name == REAL_MODEL else "small_"
        found = material(name, amounts, quick=quick)
        on_step(f"{name}: exports", 0, len(_NAMES))
        made = exports(found, _counting(f"{name}: exports", on_step))
        values = {to: each.figures() for to, each in made.items()}
        figures |= {prefix + _NAMES[to]: each["mean_kl"] for to, each in values.items()}
        figures[prefix + "kl_bf16"] = rounding(found).figures()["mean_kl"]
        worst += [each["perplexity"]["after"] / each["perplexity"]["before"] for each in values.values()]
        with TemporaryDirectory(prefix="fedgraft-") as folder:
            path = model_path(name, quick=quick)
            files = _in_llama_cpp(found, made, path, Path(folder))
        differences += [statistics.median(each) for each in files["differences"].values()]
        dense += files["dense_differences"]
        peers[name] = {"amounts": asdict(amounts), "exports": values, **files}
        on_step(f"{name}: llama.cpp", 1, 1)
    figures["ppl_ratio_worst"] = max(worst)
    figures["gguf_f32_logprob_difference"] = max(differences)
    figures["gguf_dense_f32_logprob_difference"] = max(dense)
    first = next(iter(peers.values()))
    figures["tokens_per_second_gguf_over_dense_gguf"] = statistics.median(first["speed_ratios"])
    return Measured(figures=figures, peers=peers)


def _counting(stage: str, on_step: OnStep) -> Any:
    done = iter(range(1, len(_NAMES) + 1))
    return lambda: on_step(stage, next(done), len(_NAMES))


def _in_llama_cpp(
    found: Material, made: Mapping[ExportFormat, Export], source: str, folder: Path
) -> dict[str, Any]:
    """Differences of log-probabilities, and ratios of decoding speed, of the GGUF files of one model."""
    tokenizer, texts = load_tokenizer(source), probes(found, _TEXTS, _LENGTH)
    context = 2 * _LENGTH + _TOKENS
    dense = dense_model(found.graph)
    models = {str(to): made[to].model for to in _IN_GGUF} | {"dense": dense}
    differences = {}
    for name, model in models.items():
        file = opened(model, tokenizer, folder / f"{name}.gguf", ExportedWeights.FP32, context=context)
        differences[name] = log_probability_differences(model, file, texts)
    one, other = (
        opened(model, tokenizer, folder / f"{number}.gguf", ExportedWeights.FP16, context=context)
        for number, model in enumerate((made[ExportFormat.QWEN2_MOE].model, dense))
    )
    ratios = speed_ratios(one, other, texts[0].tolist(), _TOKENS, _REPETITIONS)
    exact = differences.pop("dense")
    return {"differences": differences, "dense_differences": exact, "speed_ratios": ratios}


if __name__ == "__main__":
    run_benchmark("export", measure)
