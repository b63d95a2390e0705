from __future__ import annotations

import math

import pytest
import torch

from benchmarks.export.__main__ import QUICK, measure
from benchmarks.export.conversions import exports, material, probes, rounding
from benchmarks.export.runtime import log_probability_differences, opened, speed_ratios
from benchmarks.support.material import DEMO_MODEL
from configs.choices import ExportedWeights, ExportFormat
from models.checkpoints.load import load_tokenizer
from models.export.dense import dense_model
from models.export.mixture_format import FORMATS


@pytest.fixture(scope="module")
def found():
    """Graph and text of a quick run."""
    torch.set_num_threads(1)
    return material("mix7M", QUICK["mix7M"], quick=True)


def test_a_quick_run_gives_every_figure():
    measured = measure(True, lambda stage, done, total: None)
    small = {"small_kl_mixtral", "small_kl_qwen2moe", "small_kl_granite", "small_kl_bf16"}
    others = {
        "ppl_ratio_worst",
        "gguf_f32_logprob_difference",
        "gguf_dense_f32_logprob_difference",
        "tokens_per_second_gguf_over_dense_gguf",
    }
    assert set(measured.figures) == small | others
    assert all(math.isfinite(value) for value in measured.figures.values())
    assert measured.figures["gguf_f32_logprob_difference"] < 1e-4
    assert measured.figures["small_kl_granite"] < 1e-6


def test_graphs_visit_half_of_the_experts_with_shared_ones_and_without_default_outputs(found):
    for layer in found.graph.expert_layers():
        assert (layer.num_experts, layer.num_visits) == (8, 4) and layer.num_shared > 0
        assert layer.default is None
    assert found.text.calibration.shape == (2, 64)


def test_every_format_is_exported_and_nothing_is_lost(found):
    steps = []
    made = exports(found, lambda: steps.append(1))
    assert set(made) == set(FORMATS) and len(steps) == 3
    assert all(each.not_representable == [] for each in made.values())


def test_products_in_bf16_deviate_more_than_an_exact_export(found):
    exact = exports(found, lambda: None)[ExportFormat.GRANITE_MOE].figures()["mean_kl"]
    figures = rounding(found).figures()
    assert figures["mean_kl"] > 100 * exact and figures["tokens"] > 100


def test_llama_cpp_is_compared_with_transformers(found, tmp_path):
    model, tokenizer = dense_model(found.graph), load_tokenizer(str(DEMO_MODEL))
    file = opened(model, tokenizer, tmp_path / "x.gguf", ExportedWeights.FP32, context=100)
    texts = probes(found, 3, 8)
    assert [each.tolist() for each in texts][0] == found.text.input_ids[0, :8].tolist() and len(texts) == 3
    assert max(log_probability_differences(model, file, texts)) < 1e-4
    model.lm_head.weight.data[5] += 0.1
    assert min(log_probability_differences(model, file, texts)) > 1e-3
    ratios = speed_ratios(file, file, [0, 5, 9], 8, 2)
    assert len(ratios) == 2 and all(0.05 < ratio < 20 for ratio in ratios)
