"""The text table ``cluster_stats.txt``: sizes, variances and inertia of the clusters of each layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experts.clustering import Clusters


def cluster_table(clusters: Sequence[Clusters]) -> str:
    """Text of ``cluster_stats.txt``: neurons per expert, variance within and between, inertia, a line per layer."""
    lines = [
        f"{'layer':>5}  {'experts':>7}  {'neurons':>7}  {'within':>12}  {'between':>12}  {'inertia':>14}"
    ]
    for layer, each in enumerate(clusters):
        neurons = "/".join(str(size) for size in sorted(set(each.sizes)))
        lines.append(
            f"{layer:>5}  {len(each.sizes):>7}  {neurons:>7}  {each.variance_within:>12.6f}  "
            f"{each.variance_between:>12.6f}  {each.inertia:>14.4f}"
        )
    mean = np.mean([each.inertia for each in clusters])
    return "\n".join([*lines, f"mean inertia {mean:.4f}", ""])
