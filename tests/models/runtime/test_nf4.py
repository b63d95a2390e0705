from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_blockwise, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from models.runtime import nf4
from models.runtime.nf4 import (
    base_of,
    compute_dtype,
    is_quantized,
    quantization_config,
    quantized_linear,
    replace_linear4bit,
    weight_of,
)
from models.runtime.nf4_linear import NF4Linear


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(128, 96, generator=torch.Generator().manual_seed(0))


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def build(weight: torch.Tensor, **options) -> nn.Linear:
    return quantized_linear(weight, **{"dtype": torch.float32, "device": "cpu", **options})


def test_the_layer_is_four_bit_nf4_with_double_quantization(weight):
    layer = build(weight)
    assert isinstance(layer, Linear4bit) and isinstance(layer.weight, Params4bit)
    assert layer.weight.quant_type == "nf4" and layer.weight.dtype == torch.uint8
    assert layer.weight.quant_state.nested and not layer.weight.requires_grad
    assert layer.weight.numel() == weight.numel() // 2
    assert (layer.in_features, layer.out_features, layer.bias) == (96, 128, None)


@pytest.mark.parametrize("shape", [(128, 128), (128, 96), (6, 10), (1, 64), (2, 2), (64, 33)])
def test_the_weight_is_unpacked_as_it_was_packed(shape):
    given = rows(*shape)
    packed, state = quantize_4bit(given, quant_type="nf4", compress_statistics=True)
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    expected = state.code[codes] * scales.repeat_interleave(64)[: given.numel()]
    torch.testing.assert_close(weight_of(build(given)), expected.view(shape), atol=1e-6, rtol=1e-6)


def test_the_error_is_that_of_nf4_on_normal_weights(weight):
    error = float((weight_of(build(weight)) - weight).norm() / weight.norm())
    assert error == pytest.approx(0.092, abs=0.003)
    assert torch.equal(weight_of(build(weight.T.contiguous().T)), weight_of(build(weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_dequantized_weight(weight, dtype):
    bias = rows(128)
    layer = build(weight, bias=bias, dtype=dtype)
    assert weight_of(layer).dtype == dtype
    given = rows(5, 96)
    expected = F.linear(given.to(dtype), weight_of(layer), bias.to(dtype)).float()
    assert layer(given).dtype == torch.float32
    torch.testing.assert_close(layer(given), expected, atol=1e-4, rtol=1e-4)
    bias.zero_()
    assert layer.bias.any()  # a copy


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


def test_gradients_reach_the_input_through_the_unpacked_weight(weight):
    layer, given, other = build(weight), rows(5, 96).requires_grad_(), rows(5, 96).requires_grad_()
    factor = rows(5, 128)
    (layer(given) * factor).sum().backward()
    (F.linear(other, weight_of(layer)) * factor).sum().backward()
    torch.testing.assert_close(given.grad, other.grad)
    with torch.autocast("cpu", torch.bfloat16):
        layer(given).sum().backward()
    assert torch.isfinite(given.grad).all()
    assert layer(rows(0, 96)).shape == (0, 128)


@pytest.mark.parametrize("shape", [(64, 64), (48, 40)])
def test_layers_of_bitsandbytes_are_replaced(shape):
    theirs = Linear4bit(shape[1], shape[0], quant_type="nf4", compute_dtype=torch.float32)
    given, bias = theirs.weight.data.clone(), theirs.bias
    model = replace_linear4bit(nn.Sequential(nn.Sequential(theirs.to("cpu")), nn.Linear(2, 2)))
    ours = model[0][0]
    assert type(ours) is NF4Linear and ours.bias is bias and ours.weight is theirs.weight
    assert torch.equal(weight_of(ours), weight_of(build(given)))
    assert replace_linear4bit(model)[0][0] is ours and type(model[1]) is nn.Linear


def test_what_is_not_quantized(weight):
    plain = nn.Linear(96, 128, bias=False)
    assert not is_quantized(plain) and is_quantized(build(weight))
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
    config = quantization_config(torch.bfloat16)
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
