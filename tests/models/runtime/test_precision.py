"""The precision of a run: named, or whatever the device is faster with."""

from __future__ import annotations

import pytest
import torch

from configs.errors import UserError
from models.runtime import precision
from models.runtime.precision import (
    autocast_to_bf16,
    beats_fp32,
    bf16_is_faster,
    choose_device,
    faster_dtype,
    precision_name,
)
from tests.conftest import tiny_llama


@pytest.fixture(autouse=True)
def _fresh():
    beats_fp32.cache_clear()
    yield
    beats_fp32.cache_clear()


def test_a_named_precision_is_taken_as_it_is(monkeypatch):
    monkeypatch.setattr(precision, "_seconds", lambda *_: pytest.fail("nothing is to be measured"))
    assert autocast_to_bf16("bf16") is True
    assert autocast_to_bf16("fp32") is False


@pytest.mark.parametrize("half, single, expected", [(1.0, 2.0, True), (2.0, 1.0, False)])
def test_auto_takes_what_is_faster(monkeypatch, half, single, expected):
    seconds = {torch.bfloat16: half, torch.float32: single}
    monkeypatch.setattr(precision, "_seconds", lambda dtype, size: seconds[dtype])
    assert autocast_to_bf16("auto") is bf16_is_faster() is expected
    assert faster_dtype(torch.bfloat16) is (torch.bfloat16 if expected else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float8_e4m3fn])
def test_weights_of_other_than_16_bits_are_not_rounded(monkeypatch, dtype):
    monkeypatch.setattr(precision, "_seconds", lambda *_: pytest.fail("nothing is to be measured"))
    assert faster_dtype(dtype) is dtype


def test_each_16_bit_dtype_is_measured_by_itself(monkeypatch):
    seconds = {torch.float16: 1.0, torch.bfloat16: 3.0, torch.float32: 2.0}
    monkeypatch.setattr(precision, "_seconds", lambda dtype, size: seconds[dtype])
    assert [faster_dtype(dtype) for dtype in (torch.float16, torch.bfloat16)] == [
        torch.float16,
        torch.float32,
    ]
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    assert [beats_fp32(dtype, "cuda") for dtype in (torch.float16, torch.bfloat16)] == [True, False]


@pytest.mark.parametrize(
    "dtype, name",
    [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float64, "float64")],
)
def test_a_models_precision_has_a_name(dtype, name):
    assert precision_name(tiny_llama().to(dtype)) == name


def test_auto_measures_once(monkeypatch):
    measured = []
    monkeypatch.setattr(precision, "_seconds", lambda dtype, size: measured.append(dtype) or 1.0)
    assert autocast_to_bf16("auto") == autocast_to_bf16("auto")
    assert measured == [torch.bfloat16, torch.float32]


def test_matrix_products_are_timed():
    assert 0 < precision._seconds(torch.float32, 16) < 1


def test_a_device_is_chosen_by_name_or_by_what_there_is(monkeypatch):
    for available, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr("torch.cuda.is_available", lambda available=available: available)
        assert (choose_device("auto"), choose_device("cpu")) == (expected, "cpu")
    assert choose_device("cuda") == "cuda"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="expected a CUDA device, got none"):
        choose_device("cuda")
    with pytest.raises(UserError, match="expected `device` to be auto, cpu or cuda, got 'tpu'"):
        choose_device("tpu")
