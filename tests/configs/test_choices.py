from __future__ import annotations

import pytest

from configs.choices import Device, DomainMode, Metric, check_choice
from configs.errors import UserError


@pytest.mark.parametrize("value", ["auto", "cpu", "cuda", Device.CUDA])
def test_the_values_of_an_enumeration_are_accepted(value):
    check_choice("`device`", value, Device)


def test_another_value_is_refused_with_all_and_the_nearest():
    with pytest.raises(UserError) as refused:
        check_choice("`metric`", "reaps", Metric)
    assert str(refused.value) == (
        "expected `metric` to be reap, ean, freq or weighted_freq, got 'reaps' (did you mean 'reap'?)"
    )
    with pytest.raises(UserError, match="expected mode to be protect, got 'x'$"):
        check_choice("mode", "x", DomainMode)
    with pytest.raises(UserError, match="got None$"):
        check_choice("`device`", None, Device)
