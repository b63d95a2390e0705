from __future__ import annotations

import pytest

from benchmarks.scale.catch_up import Expected, expected_rounds
from configs.schema import RunConfig


def expected(budgets: list[int], rounds: int, fraction: float) -> Expected:
    keys = RunConfig(num_clients=len(budgets), fraction_train=fraction).participation
    return expected_rounds(budgets, rounds, keys)


def test_two_clients_that_answer_in_every_round_lack_one_step():
    assert expected([4, 2], 2, 1.0) == Expected(missing_steps=0, missing_first=1, budget=3, fresh=0.5)
    # In rounds 2 to 5; each has as many earlier updates as rounds before it.
    assert expected([4, 2], 5, 1.0) == Expected(0.75, 0.25, 3, (1 / 2 + 1 / 4 + 1 / 8 + 1 / 16) / 4)


def test_a_client_that_does_not_answer_lacks_all_steps():
    # Of three, one answers, one fails and one is late: before the third round the latter two hold no step.
    found = expected([4, 4, 4], 3, 1.0)
    total = found.missing_steps + found.missing_first
    assert total == pytest.approx((3 * 1 + 1 + 2 + 2) / 6, abs=0.2) and found.budget == 4


def test_clients_lack_more_the_fewer_are_asked():
    some, few = expected([8, 4] * 32, 6, 0.5), expected([8, 4] * 32, 12, 0.25)
    assert 0.5 < some.missing_steps < 1.5 < few.missing_steps
    assert some.budget == pytest.approx(6, abs=0.8)
