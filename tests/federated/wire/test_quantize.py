from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.updates.update import RefusedUpdate, SparseUpdate, SparseVector
from federated.wire.quantize import (
    BLOCK,
    MANTISSA,
    MAX_MAGNITUDE,
    VALUE_BITS,
    QuantizedColumn,
    dequantize,
    quantize,
    quantize_update,
    scale_count,
)

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**40), max_value=2.0**40)


def integers_by_walking(values, *, top, block):
    """Symmetric integer quantization of plain Python floats, with exact scales."""
    result = []
    for start in range(0, len(values), block):
        part = values[start : start + block]
        scale = max(abs(value) for value in part) / top
        result += [round(value / scale) * scale if scale else 0.0 for value in part]
    return result


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("bits, top, tolerance", [(4, 7, 0.6), (8, 127, 0.51)])
def test_integers_are_within_half_a_step_of_the_value(size, bits, top, tolerance):
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32) * 1e-4
    result = dequantize(quantize(values, bits))
    for start in range(0, size, BLOCK[bits]):
        step = np.abs(values[start : start + 64]).max() / top
        assert np.abs(result - values)[start : start + 64].max() <= tolerance * step
    reference = np.array(integers_by_walking(values.astype(float).tolist(), top=top, block=BLOCK[bits]))
    exact_error = np.square(reference - values).mean()
    rounded_scales = (2.0**-5 * np.abs(values).max()) ** 2 if size == 1 else 0.0
    assert np.square(result - values).mean() <= 1.15 * exact_error + rounded_scales


@pytest.mark.parametrize("magnitude", [1e-7, 1e-4, 1.0, 3e4, 1e9])
def test_halves_keep_eleven_bits_at_any_magnitude(magnitude):
    values = np.random.default_rng(0).uniform(0.1, 1, 500).astype(np.float32) * np.float32(magnitude)
    result = dequantize(quantize(values, 16))
    assert np.abs(result / values - 1).max() <= 2.0**-11


def test_two_bits_are_the_means_of_the_two_bins():
    values = np.array([1.0, -1.0, 3.0, -3.0, 1.0, 3.0], dtype=np.float32)
    assert dequantize(quantize(values, 2)).tolist() == values.tolist()
    values = np.random.default_rng(1).standard_normal(256).astype(np.float32)
    result = dequantize(quantize(values, 2))
    magnitude = np.abs(values)
    large = magnitude > magnitude.mean()
    expected = np.sign(values) * np.where(large, magnitude[large].mean(), magnitude[~large].mean())
    np.testing.assert_allclose(result, expected, rtol=2.0**-5)


@settings(max_examples=150, deadline=None)
@given(st.lists(floats, max_size=150), st.sampled_from(VALUE_BITS))
def test_quantizing_twice_changes_nothing(values, bits):
    once = dequantize(quantize(np.array(values, dtype=np.float32), bits))
    assert once.dtype == np.float32 and once.size == len(values) and np.isfinite(once).all()
    np.testing.assert_array_equal(dequantize(quantize(once, bits)), once)


@pytest.mark.parametrize("bits", VALUE_BITS)
def test_empty_zero_and_constant_columns(bits):
    assert dequantize(quantize(np.zeros(0), bits)).size == 0
    assert dequantize(quantize(np.zeros(70), bits)).tolist() == [0.0] * 70
    constant = dequantize(quantize(np.full(300, -0.5), bits))
    assert len(set(constant.tolist())) == 1 and constant[0] == pytest.approx(-0.5, rel=2.0**-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_small_block_keeps_its_own_scale(bits):
    values = np.ones(2 * BLOCK[bits], dtype=np.float32)
    values[BLOCK[bits] :] = 1e-3
    np.testing.assert_allclose(dequantize(quantize(values, bits)), values, rtol=0.04)


@pytest.mark.parametrize("bits", VALUE_BITS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**40 * 1.001, 1e300])
def test_values_that_no_change_can_have_are_refused(bits, bad):
    with pytest.raises(RefusedUpdate, match="finite"):
        quantize(np.array([1.0, bad]), bits)


def test_other_bits_are_an_error():
    with pytest.raises(ValueError, match="value bits"):
        quantize(np.ones(3), 3)


@pytest.mark.parametrize(
    "column",
    [
        QuantizedColumn(4, np.array([0], np.uint8), np.array([1], np.uint8), 0),
        QuantizedColumn(4, np.array([16], np.uint8), np.array([1], np.uint8), 0),
        QuantizedColumn(8, np.array([0], np.uint8), np.array([1], np.uint16), 0),
        QuantizedColumn(2, np.array([4], np.uint8), np.array([1, 1], np.uint8), 0),
        QuantizedColumn(4, np.array([8], np.uint8), np.array([241], np.uint8), 0),
        QuantizedColumn(4, np.array([8], np.uint8), np.array([1, 1], np.uint8), 0),
        QuantizedColumn(4, np.array([8], np.uint8), np.array([1], np.uint8), 127),
        QuantizedColumn(16, np.array([0x7C00], np.uint16), np.zeros(0, np.uint8), 0),
        QuantizedColumn(16, np.array([0x7E01], np.uint16), np.zeros(0, np.uint8), 0),
    ],
)
def test_codes_and_scales_that_no_quantizer_writes_are_refused(column):
    with pytest.raises(RefusedUpdate):
        dequantize(column)


def largest_codes(bits, exponent):
    """A column of the largest codes and scales that the format has."""
    codes = {2: np.arange(4), 4: np.arange(1, 16), 8: np.arange(1, 256), 16: np.array([0x7BFF, 0xFBFF])}[bits]
    scale = 15 << MANTISSA[bits] if bits < 16 else 0
    scales = np.full(scale_count(codes.size, bits), scale, dtype=np.uint16 if bits == 8 else np.uint8)
    return QuantizedColumn(bits, codes.astype(np.uint16 if bits == 16 else np.uint8), scales, exponent)


@pytest.mark.parametrize("bits", VALUE_BITS)
def test_what_is_read_is_finite_and_bounded(bits):
    assert np.isfinite(dequantize(largest_codes(bits, -100))).all()
    assert np.abs(dequantize(largest_codes(bits, 33))).max() <= MAX_MAGNITUDE
    with pytest.raises(RefusedUpdate, match="2..40"):
        dequantize(largest_codes(bits, 41))


@pytest.mark.parametrize("bits", VALUE_BITS)
def test_the_largest_value_can_be_read_and_packed_again(bits):
    values = np.array([MAX_MAGNITUDE, -MAX_MAGNITUDE, 1.0])
    once = dequantize(quantize(values, bits))
    np.testing.assert_allclose(once[:2], values[:2], rtol=0.04)
    np.testing.assert_array_equal(dequantize(quantize(once, bits)), once)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bits", VALUE_BITS)
def test_the_type_of_the_input_does_not_matter(bits, dtype):
    values = np.random.default_rng(2).standard_normal(129).astype(np.float16)
    column, same = quantize(values.astype(dtype), bits), quantize(values.astype(np.float32), bits)
    np.testing.assert_array_equal(column.codes, same.codes)
    np.testing.assert_array_equal(column.scales, same.scales)


def test_scale_counts():
    assert [scale_count(65, bits) for bits in VALUE_BITS] == [2, 2, 2, 0]
    assert [scale_count(0, bits) for bits in VALUE_BITS] == [0, 0, 0, 0]


def test_an_update_is_quantized_over_all_its_units():
    vectors = {(0, e): SparseVector(9, np.arange(e, 9), np.linspace(1, 2, 9 - e)) for e in range(3)}
    result = quantize_update(SparseUpdate(1, "h", vectors), 4)
    column = dequantize(quantize(np.concatenate([vectors[(0, e)].values for e in range(3)]), 4))
    assert np.concatenate([result.vectors[(0, e)].values for e in range(3)]).tolist() == column.tolist()
    assert result.vectors[(0, 1)].indices.tolist() == list(range(1, 9))
