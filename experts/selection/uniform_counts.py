"""Equal number of experts in every layer, for formats whose configuration holds one number for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from configs.errors import UserError


def check_uniform(keep_map: Mapping[int, np.ndarray], model_type: str) -> None:
    """Refuse a keep map that keeps different numbers of experts per layer.

    Raises:
        UserError: names the layers with each number.
    """
    layers: dict[int, list[int]] = {}
    for layer, experts in keep_map.items():
        layers.setdefault(len(experts), []).append(layer)
    if len(layers) > 1:
        found = "; ".join(
            f"{count} in layers {', '.join(map(str, where))}" for count, where in layers.items()
        )
        raise UserError(
            f"expected equally many experts in every layer, since the configuration of {model_type} holds one number, "
            f"got {found}; set `equalize` to take the best of those pruned back"
        )


def equalize(
    keep_map: Mapping[int, np.ndarray],
    ranks: Mapping[int, Mapping[int, float]],
    experts_per_layer: Sequence[int],
) -> dict[int, np.ndarray]:
    """Raise every layer to the largest number kept, by restoring its best-ranked pruned experts.

    Args:
        keep_map: layer to the kept experts, all of which stay.
        ranks: layer to expert to rank, smaller is better; the lower expert first on ties.
        experts_per_layer: E of each layer.

    Returns:
        Layer to sorted expert ids, equally many in each.

    Raises:
        UserError: a layer without ranks of the experts to choose from, or with too few experts.
    """
    most = max(len(experts) for experts in keep_map.values())
    return {
        layer: _raised(layer, np.asarray(experts), ranks.get(layer, {}), experts_per_layer[layer], most)
        for layer, experts in keep_map.items()
    }


def _raised(layer: int, kept: np.ndarray, ranks: Mapping[int, float], number: int, most: int) -> np.ndarray:
    pruned = np.setdiff1d(np.arange(number), kept)
    missing = most - len(kept)
    if missing > len(pruned):
        raise UserError(f"expected {most} experts in layer {layer} to equalize, got {number} in all")
    if not missing:
        return np.sort(kept)
    if unranked := [int(expert) for expert in pruned if expert not in ranks]:
        raise UserError(
            f"expected ranks to equalize layer {layer}, got none for {', '.join(map(str, unranked))}; "
            "give a CSV expert list or `saliency`"
        )
    best = sorted(pruned, key=lambda expert: (ranks[int(expert)], expert))[:missing]
    return np.sort(np.concatenate([kept, best]))
