"""GGUF files of exports under llama.cpp: log-probabilities against transformers, and decoding speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.support.llama_cpp import LlamaCpp
from configs.choices import ExportedWeights
from models.export.gguf_files.write import write_gguf


def opened(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    weights: ExportedWeights,
    *,
    context: int,
) -> LlamaCpp:
    """Write a model to a GGUF file and open it with llama.cpp."""
    write_gguf(model, tokenizer, path, weights)
    plain = tokenizer.convert_tokens_to_ids("e")
    return LlamaCpp(path, vocab_size=model.config.vocab_size, plain_token=plain, context=context)


@torch.no_grad()
def log_probability_differences(
    model: PreTrainedModel, file: LlamaCpp, texts: Sequence[Tensor]
) -> list[float]:
    """Largest difference of all log-probabilities after each text ``[S]``.

    Args:
        model: in fp32.
        file: its GGUF file in fp32.
        texts: tokens.
    """
    found = []
    for ids in texts:
        expected = model(input_ids=ids[None]).logits[0, -1].log_softmax(-1)
        found.append(float((file.log_probabilities(ids.tolist()) - expected).abs().max()))
    return found


def speed_ratios(
    file: LlamaCpp, dense: LlamaCpp, ids: list[int], tokens: int, repetitions: int
) -> list[float]:
    """Decoding tokens per second of one file over those of another, alternating.

    Args:
        file: GGUF file of interest.
        dense: GGUF file of the dense model.
        ids: prompt.
        tokens: generated tokens.
        repetitions: number of ratios.
    """
    ratios = []
    for each in (file, dense):  # the first run of a file also reads it from the disk
        each.generate(ids, tokens)
    for _ in range(repetitions):
        one, other = (each.generate(ids, tokens)["timings"]["predicted_per_second"] for each in (file, dense))
        ratios.append(one / other)
    return ratios
