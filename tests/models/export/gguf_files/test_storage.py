from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from configs.choices import ExportedWeights
from models.export.gguf_files.storage import encode, round_to_gguf, stored_type
from tests.conftest import tiny_llama
from tests.support.tiny_moes import tiny_moe

TYPE = GGMLQuantizationType
MATRIX = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "shape", "weights", "expected"),
    [
        (MATRIX, (64, 32), "fp32", TYPE.F32),
        (MATRIX, (64, 32), "bf16", TYPE.BF16),
        (MATRIX, (64, 32), "fp16", TYPE.F16),
        (MATRIX, (64, 32), "q8_0", TYPE.Q8_0),
        (MATRIX, (64, 24), "q8_0", TYPE.F16),
        ("model.norm.weight", (32,), "q8_0", TYPE.F32),
        ("model.layers.0.mlp.gate.weight", (4, 32), "q8_0", TYPE.F32),
        ("model.layers.0.mlp.gate_proj.weight", (4, 32), "fp16", TYPE.F16),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 32), "fp16", TYPE.F32),
    ],
)
def test_vectors_and_routers_are_exact_and_uneven_rows_are_fp16(name, shape, weights, expected):
    assert stored_type(name, shape, ExportedWeights(weights)) == expected


def test_types_keep_the_values_that_they_can():
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(encode(values, TYPE.F32), values.numpy())
    half = quants.dequantize(encode(values, TYPE.F16), TYPE.F16)
    assert np.array_equal(half, values.half().float().numpy())
    brain = quants.dequantize(encode(values, TYPE.BF16), TYPE.BF16)
    assert np.array_equal(brain, values.bfloat16().float().numpy())
    eight = quants.dequantize(encode(values, TYPE.Q8_0), TYPE.Q8_0)
    step = np.abs(values.numpy()).reshape(8, 32).max(1) / 127
    assert (np.abs(eight - values.numpy()).reshape(8, 32) <= 0.52 * step[:, None]).all()


@pytest.mark.parametrize("weights", ["fp16", "q8_0"])
def test_rounding_twice_changes_nothing_more(weights):
    model = tiny_moe("qwen2_moe")
    exact = {name: values.clone() for name, values in model.named_parameters()}
    round_to_gguf(model, ExportedWeights(weights))
    once = {name: values.clone() for name, values in model.named_parameters()}
    round_to_gguf(model, ExportedWeights(weights))
    for name, values in model.named_parameters():
        torch.testing.assert_close(values, once[name], rtol=0, atol=1e-6)
        kept = values.ndim < 2 or name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))
        assert torch.equal(values, exact[name]) == kept, name


def test_a_tied_head_stays_tied():
    model = tiny_llama(tie_word_embeddings=True)
    round_to_gguf(model, ExportedWeights.FP16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
