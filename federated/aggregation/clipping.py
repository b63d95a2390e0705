"""Scale factors that clip the norms of client updates to a multiple of the round's median norms."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from federated.aggregation.contribution import UpdateSummary
from models.graph.unit_vectors import Unit

# Clients that must have shipped a unit, or an entry, for statistics that resist one of them.
ENOUGH = 3


def clip_scales(
    summaries: Sequence[UpdateSummary], *, multiple: float, unit_multiple: float
) -> list[dict[Unit, float]]:
    """Factor, at most 1, of each unit of each client.

    The norm of a whole update is clipped to ``multiple`` times the lower median over all clients (norm clipping as in
    Sun et al., 2019, arXiv:1911.07963, with the median in place of a constant), then the norm of a unit to
    ``unit_multiple`` times the lower median over the clients that shipped it, where there are three or more.

    Args:
        summaries: one per client.
        multiple: of the median norm of whole updates; 0: no clipping.
        unit_multiple: of the median norm of a unit; 0: no clipping.
    """
    whole = _scales([each.norm for each in summaries], multiple)
    scales = [dict.fromkeys(each, scale) for each, scale in zip(summaries, whole, strict=True)]
    shippers: dict[Unit, list[int]] = defaultdict(list)
    for client, each in enumerate(summaries):
        for unit in each:
            shippers[unit].append(client)
    for unit, clients in shippers.items() if unit_multiple else ():
        if len(clients) >= ENOUGH:
            norms = [summaries[client][unit].norm * whole[client] for client in clients]
            for client, scale in zip(clients, _scales(norms, unit_multiple), strict=True):
                scales[client][unit] *= scale
    return scales


def _scales(norms: Sequence[float], multiple: float) -> list[float]:
    limit = multiple * statistics.median_low(norms) if multiple else float("inf")
    return [limit / norm if norm > limit else 1.0 for norm in norms]
