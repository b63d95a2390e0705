from __future__ import annotations

import pytest

from configs.errors import UserError
from configs.run_views import Privacy
from server.privacy.accountant import spent_epsilon
from server.privacy.budget import PrivacyBudget, PrivacySpent

pytest.importorskip("dp_accounting", reason="the extra privacy is not installed")


def budget(*, clip=1.0, noise=4.0, usage=0.0, epsilon=0.0) -> PrivacyBudget:
    return PrivacyBudget(Privacy(clip, noise, usage, 1e-5, epsilon))


def cost(rounds: int, **noise) -> float:
    return spent_epsilon(rounds, noise_multiplier=4.0, delta=1e-5, **noise)


def test_the_client_with_the_most_updates_decides():
    assert budget().spent({0: 2, 3: 5, 1: 1}) == PrivacySpent(cost(5), 1e-5)
    assert budget().spent({}) == PrivacySpent(0.0, 1e-5)
    assert budget(usage=2.0).spent({0: 3}).epsilon == cost(3, usage_noise=2.0)


def test_without_noise_or_bound_there_is_no_guarantee():
    assert budget(noise=0.0).spent({0: 1}) == PrivacySpent(None, None)
    assert budget(clip=0.0, noise=0.0).spent({0: 1}) == PrivacySpent(None, None)
    assert budget(clip=0.0, noise=0.0).exhausted({0: 9}) is None
    budget(clip=0.0, noise=0.0).check()


def test_the_run_ends_before_the_round_that_would_exceed_the_limit():
    limited = budget(epsilon=cost(3) + 1e-9)
    assert [bool(limited.exhausted({0: rounds})) for rounds in (0, 1, 2, 3)] == [False, False, False, True]
    assert limited.exhausted({0: 3, 1: 1}) == (
        f"another round would exceed dp-epsilon {cost(3):g} at delta 1e-05"
    )
    assert budget().exhausted({0: 10**6}) is None


def test_a_limit_below_one_round_is_refused_at_the_start():
    budget(epsilon=cost(1) + 1e-9).check()
    with pytest.raises(UserError, match=f"expected dp-epsilon of at least {cost(1):.4g}, .*got 0.1; raise"):
        budget(epsilon=0.1).check()
