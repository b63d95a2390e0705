"""Privacy loss of repeated Gaussian mechanisms, by the ``dp-accounting`` library."""

from __future__ import annotations

import math
from types import ModuleType

from configs.errors import UserError


def spent_epsilon(releases: int, *, noise_multiplier: float, usage_noise: float = 0.0, delta: float) -> float:
    """Epsilon at ``delta`` after a number of rounds in which a client took part.

    Each round releases a sum of sensitivity S with Gaussian noise of standard deviation ``noise_multiplier * S`` and,
    with usage noise, another one. Adaptively composed Gaussian mechanisms are one Gaussian mechanism whose inverse
    variance is the sum of theirs (Dong et al., 2019, arXiv:1905.02383), of which epsilon is known exactly (Balle and
    Wang, 2018, arXiv:1805.06530). No amplification by sampling is assumed.

    Args:
        releases: rounds.
        noise_multiplier: standard deviation over sensitivity of the noise on the updates; 0: none.
        usage_noise: the same of the noise on usage counts; 0: these are not released.
        delta: above 0.

    Returns:
        epsilon; infinite without noise.

    Raises:
        UserError: the library is absent.
    """
    if not releases:
        return 0.0
    if not noise_multiplier:
        return math.inf
    precision = noise_multiplier**-2 + (usage_noise**-2 if usage_noise else 0.0)
    return float(_library().get_epsilon_gaussian((releases * precision) ** -0.5, delta))


def _library() -> ModuleType:
    try:
        import dp_accounting
    except ImportError:
        raise UserError(
            "expected the library dp-accounting with dp-noise-multiplier, got none; install the extra privacy"
        ) from None
    return dp_accounting
