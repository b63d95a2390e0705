"""Gaussian noise as a function of a secret key and of what it is added to, for runs that continue bit for bit.

The noise must not follow from the seed of the run, which every client knows. The same sum of the same round gets the
same noise after a restart; another sum of that round gets independent noise, so that no two releases differ by a sum
alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.special import ndtri

KEY_BYTES = 32


@dataclass(frozen=True)
class NoiseSource:
    """Generator of standard normal noise.

    Attributes:
        key: secret of ``KEY_BYTES`` random bytes.
    """

    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"expected a key of {KEY_BYTES} bytes, got {len(self.key)}")

    def noisy(
        self, sums: Mapping[str, np.ndarray], *, deviation: float, purpose: str, server_round: int
    ) -> dict[str, np.ndarray]:
        """Add independent normal noise to every entry.

        SHAKE-256, keyed by its prefix, is a pseudorandom function; its output is mapped to normal values by the inverse
        of their distribution function, with 53 bits each.

        Args:
            sums: float64 ``[n]`` by name.
            deviation: standard deviation.
            purpose: name of the release, distinct for each kind of sum of a round.
            server_round: round of the release.
        """
        seed = self._seed(sums, purpose, server_round)
        return {
            name: total + deviation * _standard_normal(seed + name.encode(), total.size).reshape(total.shape)
            for name, total in sums.items()
        }

    def _seed(self, sums: Mapping[str, np.ndarray], purpose: str, server_round: int) -> bytes:
        facts = [purpose, server_round, [(name, total.shape) for name, total in sums.items()]]
        digest = hashlib.shake_256(self.key + json.dumps(facts).encode())
        for total in sums.values():
            digest.update(np.ascontiguousarray(total, dtype="<f8").tobytes())
        return digest.digest(KEY_BYTES)


def _standard_normal(seed: bytes, count: int) -> np.ndarray:
    """Standard normal float64 ``[count]`` from a secret seed."""
    words = np.frombuffer(hashlib.shake_256(seed).digest(8 * count), dtype="<u8")
    return ndtri(((words >> np.uint64(11)) + 0.5) * 2.0**-53)
