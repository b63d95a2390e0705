"""Clients whose updates point against those of most others, by the signs of the entries that two of them shipped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from federated.aggregation.clipping import ENOUGH
from federated.aggregation.contribution import Contribution, entry_counts
from federated.aggregation.order_statistics import EntryRanges

# Common entries without a sign that are added to those of each pair: with few, signs agree or disagree by chance.
_UNDECIDED = 100


def opposed(contributions: Sequence[Contribution], *, limit: float) -> list[bool]:
    """Whether each update points against most others: its median agreement with them is below ``-limit``.

    The agreement of two clients is, over the entries that both shipped, the share with the same sign minus that with
    opposite signs. None is opposed where fewer than three clients took part or half of them would be: there is no
    majority.

    Args:
        contributions: one per client; each is decoded once more.
        limit: 0 to 1; 0: none is opposed.
    """
    clients = len(contributions)
    if not limit or clients < ENOUGH:
        return [False] * clients
    agreement = sign_agreement(contributions)
    others = agreement[~np.eye(clients, dtype=bool)].reshape(clients, clients - 1)
    against = np.median(others, axis=1) < -limit
    return [False] * clients if 2 * against.sum() >= clients else against.tolist()


def sign_agreement(contributions: Sequence[Contribution]) -> np.ndarray:
    """Agreement of each pair of clients, float64 ``[clients, clients]``; near 0 for two with few common entries."""
    summaries, clients = [each.summarized() for each in contributions], len(contributions)
    sizes, counts = entry_counts(summaries)
    balance, common = np.zeros((clients, clients)), np.zeros((clients, clients))
    with EntryRanges(sizes, counts) as ranges:
        for client, (contribution, units) in enumerate(zip(contributions, summaries, strict=True)):
            ranges.add(contribution.unpack(), dict.fromkeys(units, 1.0), dict.fromkeys(units, float(client)))
        for spans, entries in ranges:
            signs = _signs(entries, clients, spans[-1].end)
            balance += (signs @ signs.T).toarray()
            common += abs(signs) @ abs(signs).T
    return balance / (common + _UNDECIDED)


def _signs(entries: np.ndarray, clients: int, size: int) -> csr_array:
    places = entries["weight"].astype(np.int64), entries["position"].astype(np.int64)
    return csr_array((np.sign(entries["value"]), places), shape=(clients, size))
