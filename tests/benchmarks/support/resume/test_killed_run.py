"""Runs that are killed at a stage."""

from __future__ import annotations

import hashlib

import torch
from safetensors.torch import save_file

from benchmarks.support.resume.killed_run import STAGES, dying, weights_hash


def test_the_hash_depends_on_names_and_values(tmp_path):
    def hash_of(name: str, value: float) -> str:
        save_file({name: torch.full((3,), value)}, tmp_path / "model.safetensors")
        return weights_hash(tmp_path)

    assert hash_of("a", 1.0) == hash_of("a", 1.0)
    assert len({hash_of("a", 1.0), hash_of("a", 2.0), hash_of("b", 1.0)}) == 3


def test_the_hash_is_that_of_names_and_bytes_in_the_order_of_the_names(tmp_path):
    tensors = {
        "b": torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16),
        "a": torch.tensor([True, False]),
        "c": torch.tensor(7),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    expected = b"a\x01\x00" + b"b\x80\x3f\x00\xc0" + b"c\x07" + bytes(7)
    assert weights_hash(tmp_path) == hashlib.sha256(expected).hexdigest()


def test_every_stage_names_a_function():
    assert all(name == "client_app" or callable(getattr(owner, name)) for owner, name, *_ in STAGES.values())


def test_a_function_dies_before_or_after_the_call_that_is_named():
    seen: list[str] = []
    for before in (True, False):
        replaced = dying(lambda: seen.append("call"), 2, before, lambda: seen.append("die"))
        for _ in range(3):
            replaced()
    assert seen == ["call", "die", "call", "call"] + ["call", "call", "die", "call"]
