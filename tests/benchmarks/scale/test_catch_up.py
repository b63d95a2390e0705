from __future__ import annotations

import pytest

from benchmarks.scale.catch_up import missing_steps
from configs.schema import RunConfig


def steps(clients: int, rounds: int, fraction: float) -> float:
    keys = RunConfig(num_clients=clients, fraction_train=fraction).participation
    return missing_steps(clients, rounds, keys)


def test_two_clients_that_answer_in_every_round_lack_one_step():
    assert steps(2, 2, 1.0) == steps(2, 6, 1.0) == 1.0


def test_a_client_that_never_answers_lacks_all_steps():
    # Of three, one answers, one fails and one is late; before the second round the latter two hold no step, either.
    assert steps(3, 2, 1.0) == pytest.approx(1.0)
    assert steps(3, 3, 1.0) == pytest.approx((3 * 1 + 1 + 2 + 2) / 6, abs=0.2)


def test_with_a_draw_clients_lack_more():
    assert 1.2 < steps(64, 6, 0.5) < 2.2 < steps(64, 12, 0.25)
