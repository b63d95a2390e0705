from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from configs.run_views import DriftDetection
from configs.schema import RunConfig
from models.runtime.perplexity import LossSum
from server.state.client_drift import (
    DECAY,
    TOLERANCE,
    ClientDrift,
    Observation,
    exceeds,
    jensen_shannon,
)

DEFAULTS = RunConfig().drift_detection
NAN = math.nan


def report(loss: float | None = None, visits: list | None = None) -> Observation:
    total = LossSum(loss * 100, 100) if loss is not None else LossSum()
    return Observation(0, total, [np.asarray(each, dtype=np.float64) for each in visits or []])


def first_alarm(losses, keys: DriftDetection = DEFAULTS) -> int | None:
    """Index of the first loss after which the client has drifted."""
    client = ClientDrift()
    for server_round, loss in enumerate(losses, 1):
        client.add(report(loss), server_round, keys)
        if client.drifted:
            return server_round - 1
    return None


def training_losses(seed: int, rounds: int = 50, noise: float = 0.03) -> np.ndarray:
    """Losses that fall from 5 to about 4 nats, with normal noise: the series of real runs fall as far."""
    curve = 4 + np.exp(-np.arange(rounds) / 8)
    return curve + noise * np.random.default_rng(seed).standard_normal(rounds)


@pytest.mark.parametrize("seed", range(20))
def test_a_falling_noisy_loss_is_no_drift(seed):
    assert first_alarm(training_losses(seed)) is None


@pytest.mark.parametrize("seed", range(20))
def test_a_jump_is_drift_in_its_round_and_a_slow_rise_within_five(seed):
    losses = training_losses(seed)
    jumped = losses + 0.5 * (np.arange(50) >= 25)
    assert first_alarm(jumped) == 25
    slow = losses + 0.1 * np.clip(np.arange(50) - 24, 0, None)
    assert 25 < first_alarm(slow) <= 29


def test_the_statistic_is_pages_sum_with_a_moving_reference():
    client, expected, excess = ClientDrift(), 3.0, 0.0
    for server_round, loss in enumerate([3.0, 2.5, 3.5, 3.4, 2.0, 4.0], 1):
        client.add(report(loss), server_round, DEFAULTS)
        if server_round > 1:
            excess = max(0.0, excess + loss - expected - TOLERANCE)
            expected = DECAY * expected + (1 - DECAY) * loss
        assert (client.excess, client.expected) == pytest.approx((excess, expected))
        assert client.drifted == (excess > DEFAULTS.drift_loss)
    assert client.seen == 6


def test_an_alarm_ends_when_the_loss_has_fallen_again_and_a_threshold_of_zero_is_off():
    losses = [4.0] * 5 + [5.0] + [5.0 - 0.15 * step for step in range(1, 12)]
    client, drifted = ClientDrift(), []
    for server_round, loss in enumerate(losses, 1):
        client.add(report(loss), server_round, DEFAULTS)
        drifted.append(client.drifted)
    start = drifted.index(True)
    assert start == 5 and all(drifted[start : start + 3]) and not drifted[-1]
    assert first_alarm(losses, DriftDetection(0.0, 0.0)) is None


def test_a_round_without_held_out_text_leaves_the_sum_as_it_is():
    client = ClientDrift()
    for loss in (4.0, 4.5, None):
        client.add(report(loss), 1, DEFAULTS)
    assert client.excess == pytest.approx(0.49) and client.drifted


def test_a_shift_of_routing_is_drift_in_its_round_and_becomes_the_expected_routing():
    client, before, after = ClientDrift(), [[60, 30, 10, 0]], [[5, 5, 30, 60]]
    for server_round in range(1, 4):
        client.add(report(visits=before), server_round, DEFAULTS)
    assert client.divergence == 0.0 and not client.drifted
    layers = client.add(report(visits=after), 4, DEFAULTS)
    expected = jensenshannon(before[0], after[0], base=2) ** 2
    assert layers == pytest.approx([expected]) and client.divergence == pytest.approx(expected)
    assert client.usual == pytest.approx(expected / 2)
    assert client.drifted and client.shares[0] == pytest.approx([0.325, 0.175, 0.2, 0.3])
    for server_round in range(5, 9):
        client.add(report(visits=after), server_round, DEFAULTS)
    assert not client.drifted


def test_a_routing_that_always_changes_drifts_only_where_it_changes_more_than_usual():
    client, shares = ClientDrift(), np.array([400.0, 300.0, 200.0, 100.0])
    for server_round in range(1, 8):
        client.add(report(visits=[np.roll(shares, server_round % 2)]), server_round, DEFAULTS)
        assert not client.drifted
    assert client.divergence > DEFAULTS.drift_routing and client.usual == pytest.approx(
        client.divergence, rel=0.5
    )
    client.add(report(visits=[[0, 0, 0, 9]]), 8, DEFAULTS)
    assert client.drifted


def test_equal_shares_of_other_totals_and_sampling_noise_are_no_drift():
    generator, client = np.random.default_rng(0), ClientDrift()
    shares = generator.dirichlet(np.ones(16), size=6)
    for server_round in range(1, 30):
        counts = [generator.multinomial(2000 + 100 * server_round, each) for each in shares]
        client.add(report(visits=counts), server_round, DEFAULTS)
        assert not client.drifted


def test_a_layer_with_another_number_of_experts_restarts_and_others_go_on():
    client = ClientDrift()
    client.add(report(visits=[[1, 3], [2, 2]]), 1, DEFAULTS)
    layers = client.add(report(visits=[[1, 3, 4], [4, 0]]), 2, DEFAULTS)
    assert math.isnan(layers[0]) and layers[1] == pytest.approx(jensenshannon([2, 2], [4, 0], base=2) ** 2)
    assert client.divergence == layers[1]
    assert client.shares[0].tolist() == [0.125, 0.375, 0.5] and client.shares[1].tolist() == [0.75, 0.25]


def test_only_experts_held_before_and_after_are_compared():
    client = ClientDrift()
    client.add(report(visits=[[50, 50, NAN, NAN]]), 1, DEFAULTS)
    assert client.add(report(visits=[[20, 20, 60, NAN]]), 2, DEFAULTS) == [pytest.approx(0.0)]
    assert client.shares[0][:3].tolist() == pytest.approx([0.35, 0.35, 0.6]) and np.isnan(client.shares[0][3])
    assert math.isnan(client.add(report(visits=[[NAN, NAN, NAN, 9]]), 3, DEFAULTS)[0])
    assert client.divergence is None
    assert client.shares[0].tolist() == pytest.approx([0.35, 0.35, 0.6, 1.0])


@pytest.mark.parametrize("visits", [[[0, 0]], [[NAN, NAN]], [[]]])
def test_layers_without_any_visit_have_no_divergence(visits):
    client = ClientDrift()
    for server_round in (1, 2):
        layers = client.add(report(visits=visits), server_round, DEFAULTS)
    assert math.isnan(layers[0]) and client.divergence is None and not client.drifted


def test_restart_forgets_everything_but_the_last_round():
    client = ClientDrift()
    for server_round, loss in enumerate([4.0, 5.0], 1):
        client.add(report(loss, [[1, 2]]), server_round, DEFAULTS)
    assert client.drifted
    client.restart()
    assert client == ClientDrift(seen=2)
    client.add(report(9.0, [[7, 0]]), 3, DEFAULTS)
    assert (client.expected, client.excess, client.divergence, client.drifted) == (9.0, 0.0, None, False)


def test_jensen_shannon_is_that_of_scipy_bounded_and_symmetric():
    generator = np.random.default_rng(1)
    for _ in range(50):
        p, q = generator.dirichlet(np.full(8, 0.3), size=2)
        assert jensen_shannon(7 * p, q) == pytest.approx(jensenshannon(p, q, base=2) ** 2, abs=1e-12)
        assert jensen_shannon(p, q) == pytest.approx(jensen_shannon(q, p))
        assert jensen_shannon(p, p) == 0.0
    assert jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 1.0


def test_thresholds_are_exclusive_and_zero_is_off():
    assert exceeds(0.3, 0.2) and not exceeds(0.2, 0.2)
    assert not exceeds(9.0, 0.0) and not exceeds(None, 0.1)
