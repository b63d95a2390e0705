"""Options of the verbs that choose experts: saliency measure, selection rules, expert lists, averaging."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.choices import Alignment, DomainMode, Metric, SafetyMode, Strategy
from scripts.shared.verb import given_options

if TYPE_CHECKING:
    from experts.selection.choice import ExpertChoice
    from models.moe_files.layout import MoELayout

SaliencyFiles = Annotated[
    list[Path],
    typer.Option("--saliency", help="Saliency file (.npz); repeatable: the ranks of all files are summed."),
]


@dataclass(frozen=True)
class MetricOptions:
    """Saliency measure that ranks experts."""

    metric: Annotated[
        Metric,
        typer.Option(
            help="Saliency measure: mean gate weight times output norm (reap), summed output L2 norm (ean), routing "
            "frequency (freq), or summed gate weight (weighted_freq)."
        ),
    ] = Metric.REAP


@dataclass(frozen=True)
class AveragingOptions:
    """Alignment and largest number of the experts that are averaged into one."""

    alignment: Annotated[
        Alignment,
        typer.Option(
            help="Alignment of neurons before experts are compared and averaged: none, sign flips, or sign flips and "
            "permutation (centroid)."
        ),
    ] = Alignment.CENTROID
    max_group_size: Annotated[
        int, typer.Option(min=1, help="Most experts that are merged into one, itself included.")
    ] = 4


@dataclass(frozen=True)
class ProtectionOptions:
    """Experts that stay whatever their rank, and the minimum per layer."""

    min_experts_per_layer: Annotated[
        int, typer.Option(min=1, help="Fewest experts that a layer keeps, without its shared ones.")
    ] = 1
    guard_top: Annotated[
        float,
        typer.Option(min=0, max=100, help="Percentage of every layer's experts, the best ranked, that stay."),
    ] = 0.0
    safety_map: Annotated[Path | None, typer.Option(help="Expert map of `fedgraft safety-scan`.")] = None
    domain_map: Annotated[Path | None, typer.Option(help="Expert map of `fedgraft domain-scan`.")] = None
    ignore_experts: Annotated[
        str,
        typer.Option(
            help="Expert ids that stay in every layer, e.g. 1,2,250..255 (a range includes its end)."
        ),
    ] = ""


@dataclass(frozen=True)
class RuleOptions(ProtectionOptions):
    """Order of removal, and use of the expert maps."""

    strategy: Annotated[
        Strategy,
        typer.Option(
            help="Order of removal: by worst rank (bottom), or spread over the worse half without the best expert of "
            "a layer (strided)."
        ),
    ] = Strategy.BOTTOM
    safety_mode: Annotated[
        SafetyMode,
        typer.Option(help="Experts of the safety map stay (protect) or are removed first (target)."),
    ] = SafetyMode.PROTECT
    domain_mode: Annotated[DomainMode, typer.Option(help="Experts of the domain map stay (protect).")] = (
        DomainMode.PROTECT
    )


@dataclass(frozen=True)
class ChoiceOptions(MetricOptions, RuleOptions):
    """Experts to remove, by expert lists or by saliency."""

    expert_list: Annotated[
        list[Path] | None,
        typer.Option(
            help="Expert list of `fedgraft experts select`, CSV or JSON; repeatable: each gives an output OUT/NAME."
        ),
    ] = None
    saliency: Annotated[
        list[Path] | None,
        typer.Option(
            help="Saliency file (.npz), repeatable: ranks experts for --n-prune, or fills in layers that a list "
            "leaves out."
        ),
    ] = None
    n_prune: Annotated[
        int | None,
        typer.Option(
            min=0, help="Experts to remove: per layer, or in all with --model-wide; never a shared one."
        ),
    ] = None
    model_wide: Annotated[
        bool, typer.Option("--model-wide", help="Rank and remove experts over all layers together.")
    ] = False

    def choices(self, layout: MoELayout, *, equalize: bool, as_json: bool) -> list[ExpertChoice]:
        """Choose the experts that stay; print the lists that were read, on stderr where stdout is JSON.

        Raises:
            UserError: as ``experts.selection.choice.choose_experts``.
        """
        from experts.selection.choice import choose_experts

        if self.expert_list:
            _warn_of_unused(given_options())
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {"num_shared": layout.shared_per_layer, "equalize": equalize}
        choices = choose_experts(layout.experts_per_layer, **values)
        for line in (line for choice in choices for line in choice.loaded):
            typer.echo(line, err=as_json)
        for choice in choices:
            if sum(map(len, choice.keep_map.values())) == sum(layout.experts_per_layer):
                by = f"{choice.source}" if choice.source else f"--n-prune {self.n_prune}"
                warnings.warn(f"nothing to remove with {by}: all experts stay", stacklevel=1)
        return choices


# Options of the choice by saliency, without effect where an expert list is given.
_BY_SALIENCY = (
    "n_prune",
    "strategy",
    "model_wide",
    "min_experts_per_layer",
    "guard_top",
    "safety_map",
    "safety_mode",
    "domain_map",
    "domain_mode",
    "ignore_experts",
)


def _warn_of_unused(given: set[str]) -> None:
    unused = [f"--{name.replace('_', '-')}" for name in _BY_SALIENCY if name in given]
    if unused:
        verb = "is" if len(unused) == 1 else "are"
        warnings.warn(f"{', '.join(unused)} {verb} ignored beside --expert-list", stacklevel=1)
