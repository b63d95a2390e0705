"""From the options of ``prune`` and ``merge`` to the experts that stay."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scripts.shared.expert_options import selection_of

if TYPE_CHECKING:
    import numpy as np

    from experts.saliency.measures import Saliency

ExpertLists = Annotated[
    list[Path] | None,
    typer.Option(
        "--expert-list",
        help="Expert list of `fedgraft experts select`, CSV or JSON; repeatable: each makes an output OUT/NAME.",
    ),
]
OptionalSaliencyFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--saliency",
        help="Saliency file (.npz), repeatable; chooses with --n-prune, or fills in layers that a list leaves out.",
    ),
]
NumberToPrune = Annotated[
    int | None,
    typer.Option(min=0, help="Experts to remove: per layer, or in all with --model-wide."),
]
ModelWide = Annotated[bool, typer.Option("--model-wide", help="Rank and remove over all layers together.")]
Equalize = Annotated[
    bool,
    typer.Option(
        "--equalize",
        help="Raise every layer to the largest number kept: the best-ranked pruned experts come back.",
    ),
]
Preview = Annotated[bool, typer.Option("--preview", help="Show what would go; write nothing.")]
OutDirectory = Annotated[
    Path | None, typer.Option("--out", "--output", help="Directory of the new checkpoint.")
]


@dataclass(frozen=True, eq=False)
class ExpertChoice:
    """The experts that stay, and where that comes from.

    Attributes:
        keep_map: MoE-layer ordinal to sorted expert ids, every layer.
        ranks: layer to expert to rank, smaller is better; layers may be missing.
        source: the expert list; None for a choice by saliency alone.
        loaded: what was read of the list and how many experts it keeps, a line each.
    """

    keep_map: dict[int, np.ndarray]
    ranks: dict[int, dict[int, float]]
    source: Path | None = None
    loaded: tuple[str, ...] = ()


def choose_experts(
    experts_per_layer: Sequence[int],
    *,
    expert_list: Sequence[Path] | None,
    saliency: Sequence[Path] | None,
    n_prune: int | None,
    metric: str = "reap",
    equalize: bool = False,
    as_json: bool = False,
    **options: Any,
) -> list[ExpertChoice]:
    """One choice per expert list, or one by saliency.

    Args:
        experts_per_layer: E of each MoE layer of the model.
        expert_list: files; they win over the saliency, which then fills in the layers that they leave out.
        saliency: files.
        n_prune: required with saliency alone, and ignored with a warning beside a list.
        metric: of the saliency.
        equalize: whether every layer is raised to the largest number kept.
        as_json: whether stdout belongs to the result, so that the lists that were read are told on stderr.
        options: of ``selection_of``.

    Raises:
        UserError: neither list nor saliency; saliency alone without ``n_prune``; files that do not fit the model.
    """
    from configs.errors import UserError
    from experts.saliency.measures import check_same_model, load_saliency

    saliencies = [load_saliency(path) for path in saliency or []]
    if not expert_list and not saliencies:
        raise UserError("expected --expert-list FILE, or --saliency FILE with --n-prune N, got neither")
    if saliencies:
        check_same_model(saliencies)
        _check_model(saliencies[0], experts_per_layer)
    if expert_list:
        _warn_of_unused(n_prune=n_prune, **options)
        choices = [_from_list(path, experts_per_layer, saliencies, metric) for path in expert_list]
    elif n_prune is None:
        raise UserError("expected --n-prune N with --saliency, got none; say how many experts go")
    else:
        files = [str(path) for path in saliency or []]
        choices = [_from_saliency(saliencies, metric, files, n_prune=n_prune, **options)]
    if equalize:
        choices = [_equalized(choice, experts_per_layer) for choice in choices]
    for line in (line for choice in choices for line in choice.loaded):
        typer.echo(line, err=as_json)
    return choices


def output_directories(choices: Sequence[ExpertChoice], out: Path | None) -> list[Path]:
    """Where each choice goes: into ``out``, or, if there are several, into a folder in it named like its list.

    Raises:
        UserError: no ``out``, or two lists of one name.
    """
    from configs.errors import UserError

    if out is None:
        raise UserError("expected --out DIR, got none; name a directory, or pass --preview")
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
    saliencies: Sequence[Saliency],
    metric: str,
) -> ExpertChoice:
    from configs.errors import UserError
    from experts.saliency.measures import add_saliency
    from experts.selection.expert_list import complete_keep_map, load_expert_list, read_ranks

    listed = load_expert_list(path)
    filling = add_saliency(saliencies) if saliencies else None
    try:
        keep_map = complete_keep_map(listed, experts_per_layer, filling, metric)
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


def _from_saliency(
    saliencies: Sequence[Saliency], metric: str, files: Sequence[str], **options: Any
) -> ExpertChoice:
    from experts.selection.rules import select_experts

    chosen = select_experts(saliencies, metric, selection_of(**options), files=files)
    return ExpertChoice(chosen.keep_map, _as_mapping(chosen.rank_sum))


def _equalized(choice: ExpertChoice, experts_per_layer: Sequence[int]) -> ExpertChoice:
    from experts.selection.uniform_counts import equalize

    return replace(choice, keep_map=equalize(choice.keep_map, choice.ranks, experts_per_layer))


def _ranks(saliencies: Sequence[Saliency], metric: str) -> dict[int, dict[int, float]]:
    from experts.saliency.ranks import rank_sums

    return _as_mapping(rank_sums(saliencies, metric, model_wide=False)) if saliencies else {}


def _as_mapping(rank_sum: np.ndarray) -> dict[int, dict[int, float]]:
    """Ranks ``[L, E]`` as layer to expert to rank; absent experts are NaN, and nobody asks for them."""
    return {layer: dict(enumerate(row.tolist())) for layer, row in enumerate(rank_sum)}


def _check_model(saliency: Saliency, experts_per_layer: Sequence[int]) -> None:
    from configs.errors import UserError

    if saliency.experts_per_layer != list(experts_per_layer):
        raise UserError(
            f"expected saliency of a model with {list(experts_per_layer)} experts per layer, got "
            f"{saliency.experts_per_layer}; collect it on this model"
        )


def _warn_of_unused(**options: Any) -> None:
    """Say which of the options that choose by saliency mean nothing beside an expert list."""
    defaults: Mapping[str, Any] = {
        "strategy": "bottom",
        "safety_mode": "protect",
        "domain_mode": "protect",
        "min_experts_per_layer": 1,
        "model_wide": False,
        "ignore_experts": "",
    }
    unused = [f"--{name.replace('_', '-')}" for name, value in options.items() if value != defaults.get(name)]
    if unused:
        verb = "is" if len(unused) == 1 else "are"
        warnings.warn(f"{', '.join(unused)} {verb} ignored beside --expert-list", stacklevel=1)
