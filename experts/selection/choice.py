"""Choice of the experts that stay: from expert lists, or from saliency by selection rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from experts.saliency.expert_map import load_expert_map
from experts.saliency.measures import Saliency, add_saliency, check_same_model, load_saliency
from experts.saliency.ranks import rank_sums
from experts.selection.expert_list import complete_keep_map, load_expert_list, read_ranks
from experts.selection.rules import SelectionRules, parse_expert_ids, select_experts
from experts.selection.uniform_counts import equalize as equal_counts


@dataclass(frozen=True, eq=False)
class ExpertChoice:
    """The experts that stay, with their ranks and the list that they come from.

    Attributes:
        keep_map: MoE-layer ordinal to sorted expert ids, for every layer.
        ranks: layer to expert to rank, smaller is better; layers may be missing.
        source: path of the expert list; None for a choice by saliency alone.
        loaded: lines that name the list read and the number of experts it keeps.
    """

    keep_map: dict[int, np.ndarray]
    ranks: dict[int, dict[int, float]]
    source: Path | None = None
    loaded: tuple[str, ...] = ()


def read_selection(
    *,
    safety_map: Path | None = None,
    domain_map: Path | None = None,
    ignore_experts: str = "",
    **rules: Any,
) -> SelectionRules:
    """Build selection rules, with expert maps read from files and expert ids parsed from text.

    Args:
        safety_map: file of a safety scan.
        domain_map: file of a domain scan.
        ignore_experts: expert ids such as ``1,2,250..255``.
        rules: further fields of ``SelectionRules``.

    Raises:
        UserError: as ``SelectionRules``, ``load_expert_map`` and ``parse_expert_ids``.
    """
    return SelectionRules(
        safety=load_expert_map(safety_map) if safety_map else None,
        domain=load_expert_map(domain_map) if domain_map else None,
        ignored=parse_expert_ids(ignore_experts),
        **rules,
    )


def choose_experts(
    experts_per_layer: Sequence[int],
    *,
    num_shared: Sequence[int] = (),
    expert_list: Sequence[Path] | None,
    saliency: Sequence[Path] | None,
    n_prune: int | None,
    metric: str = "reap",
    equalize: bool = False,
    **rules: Any,
) -> list[ExpertChoice]:
    """Choose the experts that stay: one choice per expert list, or one by saliency.

    Args:
        experts_per_layer: E of each MoE layer of the model.
        num_shared: shared experts per layer, the first of the layer, which all choices keep; empty for none.
        expert_list: files; they take precedence over the saliency, which then fills in layers that they leave out.
        saliency: files.
        n_prune: number of routed experts to remove; required with saliency alone, unused with a list.
        metric: saliency measure.
        equalize: whether every layer is raised to the largest number kept.
        rules: of ``read_selection``; unused with a list.

    Raises:
        UserError: neither list nor saliency; saliency alone without ``n_prune``; files that do not fit the model.
    """
    saliencies = [load_saliency(path) for path in saliency or []]
    if not expert_list and not saliencies:
        raise UserError("expected `expert_list` FILE, or `saliency` FILE with `n_prune` N, got neither")
    if saliencies:
        check_same_model(saliencies)
        _check_model(saliencies[0], experts_per_layer, num_shared)
    if expert_list:
        choices = [
            _from_list(path, experts_per_layer, num_shared, saliencies, metric) for path in expert_list
        ]
    elif n_prune is None:
        raise UserError(
            "expected `n_prune` N with `saliency`, got none; give the number of experts to remove"
        )
    else:
        files = [str(path) for path in saliency or []]
        chosen = select_experts(saliencies, metric, read_selection(n_prune=n_prune, **rules), files=files)
        choices = [ExpertChoice(chosen.keep_map, _as_mapping(chosen.rank_sum))]
    return [_equalized(choice, experts_per_layer) for choice in choices] if equalize else choices


def output_directories(choices: Sequence[ExpertChoice], out: Path | None) -> list[Path]:
    """Output directory of each choice: ``out``, or for several choices a folder in it named like the list.

    Raises:
        UserError: no ``out``, or two lists of one name.
    """
    if out is None:
        raise UserError("expected `out` DIR, got none; name a directory, or set `preview`")
    if len(choices) == 1:
        return [out]
    names = [choice.source.stem for choice in choices if choice.source]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"expected expert lists of different names, got {twice[0]} twice; each names its output"
        )
    return [out / name for name in names]


def _from_list(
    path: Path,
    experts_per_layer: Sequence[int],
    num_shared: Sequence[int],
    saliencies: Sequence[Saliency],
    metric: str,
) -> ExpertChoice:
    listed = load_expert_list(path)
    filling = add_saliency(saliencies) if saliencies else None
    try:
        keep_map = complete_keep_map(listed, experts_per_layer, filling, metric, num_shared)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    kept = sum(map(len, keep_map.values()))
    left_out = [layer for layer in keep_map if layer not in listed]
    by = "saliency decides" if saliencies else "all experts stay"
    filled = f"; not listed, so that {by}: layers {', '.join(map(str, left_out))}" if left_out else ""
    loaded = (
        f"Loading expert list from: {path}",
        f"keeps {kept} of {sum(experts_per_layer)} experts{filled}",
    )
    return ExpertChoice(keep_map, _ranks(saliencies, metric) | read_ranks(path), path, loaded)


def _equalized(choice: ExpertChoice, experts_per_layer: Sequence[int]) -> ExpertChoice:
    return replace(choice, keep_map=equal_counts(choice.keep_map, choice.ranks, experts_per_layer))


def _ranks(saliencies: Sequence[Saliency], metric: str) -> dict[int, dict[int, float]]:
    return _as_mapping(rank_sums(saliencies, metric, model_wide=False)) if saliencies else {}


def _as_mapping(rank_sum: np.ndarray) -> dict[int, dict[int, float]]:
    """Ranks ``[L, E]`` as layer to expert to rank; the NaN of absent experts is never read."""
    return {layer: dict(enumerate(row.tolist())) for layer, row in enumerate(rank_sum)}


def _check_model(
    saliency: Saliency, experts_per_layer: Sequence[int], num_shared: Sequence[int] = ()
) -> None:
    if saliency.experts_per_layer != list(experts_per_layer):
        raise UserError(
            f"expected saliency of a model with {list(experts_per_layer)} experts per layer, got "
            f"{saliency.experts_per_layer}; collect it on this model"
        )
    shared = (list(num_shared) or [0] * len(experts_per_layer), saliency.shared_per_layer)
    if shared[0] != shared[1]:
        raise UserError(
            f"expected saliency of a model with {shared[0]} shared experts per layer, got {shared[1]}; "
            "collect it on this model"
        )
