from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from models import nf4
from models.nf4 import (
    base_of,
    compute_dtype,
    is_quantised,
    keep_trainable,
    quantisation_config,
    quantised_linear,
    weight_of,
)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(128, 96, generator=torch.Generator().manual_seed(0))


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def build(weight: torch.Tensor, **options) -> nn.Linear:
    return quantised_linear(weight, **{"dtype": torch.float32, "device": "cpu", **options})


def test_the_layer_is_four_bit_nf4_with_double_quantisation(weight):
    layer = build(weight)
    assert isinstance(layer, Linear4bit) and isinstance(layer.weight, Params4bit)
    assert layer.weight.quant_type == "nf4" and layer.weight.dtype == torch.uint8
    assert layer.weight.quant_state.nested and not layer.weight.requires_grad
    assert layer.weight.numel() == weight.numel() // 2
    assert (layer.in_features, layer.out_features, layer.bias) == (96, 128, None)


def test_it_is_what_bitsandbytes_makes_of_the_weight(weight):
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(weight_of(build(weight)), dequantize_4bit(packed, state))
    assert torch.equal(weight_of(build(weight.T.contiguous().T)), dequantize_4bit(packed, state))
    error = (weight_of(build(weight)) - weight).norm() / weight.norm()
    assert 0.05 < error < 0.12  # of NF4 on normal weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_dequantised_weight(weight, dtype):
    bias = rows(128)
    layer = build(weight, bias=bias, dtype=dtype)
    assert weight_of(layer).dtype == dtype
    given = rows(5, 96)
    expected = F.linear(given.to(dtype), weight_of(layer), bias.to(dtype)).float()
    assert layer(given).dtype == torch.float32
    torch.testing.assert_close(layer(given), expected, atol=1e-4, rtol=1e-4)
    bias.zero_()
    assert layer.bias.any()  # a copy


@pytest.mark.parametrize("shape", [(32, 96), (6, 10), (2, 2), (1, 64)])
def test_small_shapes(shape):
    layer = build(rows(*shape))
    torch.testing.assert_close(layer(rows(3, shape[1])), F.linear(rows(3, shape[1]), weight_of(layer)))


def test_evaluation_leaves_the_layer_as_it_was(weight):
    layer = build(weight)
    given, before = rows(5, 96).requires_grad_(), weight_of(layer)
    layer(given).sum().backward()
    gradient, given.grad = given.grad, None
    layer.eval()
    with torch.no_grad():
        layer(given.detach())
    assert torch.equal(weight_of(layer), before)
    layer.train()(given).sum().backward()
    assert torch.equal(given.grad, gradient) and gradient.any()


def test_a_model_is_kept_trainable(weight):
    layer = build(weight)
    layer.support_avx512bf16_for_cpu = True
    assert keep_trainable(nn.Sequential(layer))[0] is layer
    assert layer.support_avx512bf16_for_cpu is False


def test_what_is_not_quantised(weight):
    plain = nn.Linear(96, 128, bias=False)
    assert not is_quantised(plain) and is_quantised(build(weight))
    assert torch.equal(weight_of(plain), plain.weight) and not weight_of(plain).requires_grad
    assert base_of(plain) is plain
    wrapper = nn.Module()
    wrapper.base_layer = plain
    assert base_of(wrapper) is plain and torch.equal(weight_of(wrapper), plain.weight)


@pytest.mark.parametrize(
    "faster, dtype", [(True, torch.bfloat16), (False, torch.float32)], ids=["bf16", "fp32"]
)
def test_products_are_in_bf16_where_that_is_faster(monkeypatch, faster, dtype):
    asked = []
    monkeypatch.setattr(nf4, "bf16_is_faster", lambda device: asked.append(device) or faster)
    assert compute_dtype("cpu") == compute_dtype(torch.device("cuda", 1)) == dtype
    assert asked == ["cpu", "cuda"]


def test_what_transformers_is_told():
    config = quantisation_config(torch.bfloat16)
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
