from __future__ import annotations

import builtins
import math

import pytest
from scipy.stats import norm

from configs.errors import UserError
from server.privacy.accountant import spent_epsilon

pytest.importorskip("dp_accounting", reason="the extra privacy is not installed")


def delta_of(epsilon: float, deviation: float) -> float:
    """Delta of one Gaussian mechanism of sensitivity 1 (Balle and Wang, 2018, theorem 8)."""
    half, rest = 1 / (2 * deviation), epsilon * deviation
    return norm.cdf(half - rest) - math.exp(epsilon) * norm.cdf(-half - rest)


@pytest.mark.parametrize(("noise", "rounds"), [(0.8, 1), (2.5, 1), (2.5, 12), (10.0, 400)])
def test_epsilon_is_that_of_the_analytic_gaussian_mechanism(noise, rounds):
    epsilon = spent_epsilon(rounds, noise_multiplier=noise, delta=1e-5)
    assert delta_of(epsilon, noise / math.sqrt(rounds)) == pytest.approx(1e-5, rel=1e-4)


def test_epsilon_is_below_the_bound_of_flowers_renyi_accountant_and_near_it():
    from flwr.serverapp import (
        GaussianPrivacyEvent,
        NeighboringRelation,
        PrivacyConfig,
        RdpAccountant,
        SamplingMethod,
    )

    keys = PrivacyConfig(1e-5, 64, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION)
    for rounds in (1, 12, 100):
        accountant = RdpAccountant(keys)
        accountant.compose(GaussianPrivacyEvent(2.5, 64, 64), rounds)
        bound = accountant.get_epsilon(1e-5)
        assert 0.85 * bound < spent_epsilon(rounds, noise_multiplier=2.5, delta=1e-5) <= bound


def test_epsilon_has_published_values():
    """The deviation that the code of Balle and Wang returns for epsilon 1 and delta 1e-5."""
    assert spent_epsilon(1, noise_multiplier=3.730631634944469, delta=1e-5) == pytest.approx(1.0, rel=1e-6)
    # The classical bound sqrt(2 ln(1.25 / delta)) / epsilon (Dwork and Roth, 2014) asks for more noise.
    classical = math.sqrt(2 * math.log(1.25 / 1e-5)) / 0.9
    assert 0.6 < spent_epsilon(1, noise_multiplier=classical, delta=1e-5) < 0.9
    # Renyi bound in closed form, minimized over orders (Mironov, 2017): T a / (2 z^2) + ln(1 / delta) / (a - 1).
    best = 12 / (2 * 4**2) + math.sqrt(2 * 12 * math.log(1e5)) / 4
    assert 0.75 * best < spent_epsilon(12, noise_multiplier=4.0, delta=1e-5) < best


def test_the_noise_on_usage_is_composed():
    one = spent_epsilon(6, noise_multiplier=3.0, delta=1e-5)
    both = spent_epsilon(6, noise_multiplier=3.0, usage_noise=3.0, delta=1e-5)
    assert both == pytest.approx(spent_epsilon(12, noise_multiplier=3.0, delta=1e-5)) and both > one
    assert spent_epsilon(6, noise_multiplier=3.0, usage_noise=1e9, delta=1e-5) == pytest.approx(one)


def test_no_round_costs_nothing_and_no_noise_has_no_guarantee():
    assert spent_epsilon(0, noise_multiplier=1.0, delta=1e-5) == 0.0
    assert spent_epsilon(1, noise_multiplier=0.0, delta=1e-5) == math.inf


def test_an_absent_library_is_named(monkeypatch):
    imported = builtins.__import__

    def absent(name, *args, **options):
        if name == "dp_accounting":
            raise ImportError(name)
        return imported(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match="dp-accounting .* install the extra privacy"):
        spent_epsilon(1, noise_multiplier=1.0, delta=1e-5)
