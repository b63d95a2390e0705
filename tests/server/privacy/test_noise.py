from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from server.privacy.noise import NoiseSource

KEY = bytes(range(32))
COUNT = 200_000


def drawn(source=None, *, total=None, deviation=1.0, purpose="update", server_round=1) -> np.ndarray:
    total = np.zeros(COUNT) if total is None else total
    source = source or NoiseSource(KEY)
    noisy = source.noisy({"a": total}, deviation=deviation, purpose=purpose, server_round=server_round)
    return noisy["a"] - total


def test_the_noise_is_normal_with_the_deviation_asked_for():
    noise = drawn(deviation=0.25)
    assert noise.std() == pytest.approx(0.25, rel=4 / np.sqrt(2 * COUNT))
    assert abs(noise.mean()) < 4 * 0.25 / np.sqrt(COUNT)
    assert stats.kstest(noise / 0.25, "norm").pvalue > 1e-3


def test_the_noise_is_a_function_of_key_sum_purpose_and_round():
    first = drawn()
    assert np.array_equal(first, drawn())
    planted = np.zeros(COUNT)
    planted[-1] = 1e-12
    others = [
        drawn(NoiseSource(bytes(32))),
        drawn(purpose="usage"),
        drawn(server_round=2),
        drawn(total=planted),  # two sums never differ by themselves alone
    ]
    for other in others:
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(COUNT)


def test_entries_and_names_get_independent_noise():
    sums = {"0.0": np.zeros(COUNT), "0.1": np.zeros(COUNT), "1.0": np.zeros((2, 3))}
    noisy = NoiseSource(KEY).noisy(sums, deviation=1.0, purpose="update", server_round=1)
    assert abs(np.corrcoef(noisy["0.0"], noisy["0.1"])[0, 1]) < 5 / np.sqrt(COUNT)
    assert abs(np.corrcoef(noisy["0.0"][1:], noisy["0.0"][:-1])[0, 1]) < 5 / np.sqrt(COUNT)
    assert noisy["1.0"].shape == (2, 3) and len(set(noisy["1.0"].ravel())) == 6


def test_without_deviation_the_sum_is_unchanged():
    total = np.array([1.5, -2.0])
    assert drawn(total=total, deviation=0.0).tolist() == [0.0, 0.0]


def test_the_key_is_whole_and_never_shown():
    with pytest.raises(ValueError, match="expected a key of 32 bytes, got 3"):
        NoiseSource(b"abc")
    assert repr(NoiseSource(KEY)) == "NoiseSource()"
