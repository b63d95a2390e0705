from __future__ import annotations

import pytest

from configs.errors import UserError
from models.healing.options import HealingOptions


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "steps"),
        ({"steps": 3, "minutes": 1.0}, "minutes"),
        ({"steps": -1}, "steps"),
        ({"steps": 3, "minutes": -1.0}, "minutes"),
        ({"steps": 3, "rank": 0}, "rank"),
        ({"steps": 3, "batch_size": 0}, "batch_size"),
        ({"steps": 3, "learning_rate": 0.0}, "learning_rate"),
        ({"steps": 3, "learning_rate": float("nan")}, "learning_rate"),
        ({"steps": 3, "temperature": float("inf")}, "temperature"),
        ({"steps": 3, "train": "expert"}, "experts"),
        ({"steps": 3, "loss": "mse"}, "hidden"),
        ({"steps": 3, "precision": "nf4"}, "cannot train"),
    ],
)
def test_options_out_of_range_are_refused(values, named):
    with pytest.raises(UserError, match=named):
        HealingOptions(**values)


def test_either_steps_or_minutes_are_enough():
    assert HealingOptions(steps=3).minutes == 0.0
    assert HealingOptions(minutes=0.5).steps == 0
