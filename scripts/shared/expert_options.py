"""The options that say which experts go; `experts select`, `prune` and `merge` share them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from experts.selection.rules import SelectionRules

SaliencyFiles = Annotated[
    list[Path],
    typer.Option("--saliency", help="Saliency file (.npz); repeatable: the ranks of all files are summed."),
]
Metric = Annotated[str, typer.Option(help="reap, ean, freq or weighted_freq.")]
Strategy = Annotated[
    str,
    typer.Option(
        help="bottom: the worst go; strided: spread over the worse half, never the best of a layer."
    ),
]
MinExperts = Annotated[int, typer.Option(min=1, help="Experts that every layer keeps at least.")]
SafetyMap = Annotated[Path | None, typer.Option(help="Expert map of `fedgraft safety-scan`.")]
SafetyMode = Annotated[
    str, typer.Option(help="protect: flagged experts stay; target: they go first, worst rank first.")
]
DomainMap = Annotated[Path | None, typer.Option(help="Expert map of `fedgraft domain-scan`.")]
DomainMode = Annotated[str, typer.Option(help="protect: flagged experts stay.")]
IgnoreExperts = Annotated[
    str,
    typer.Option(help="Expert ids that stay in every layer, e.g. 1,2,250..255 (a range includes its end)."),
]


def selection_of(
    *,
    safety_map: Path | None = None,
    domain_map: Path | None = None,
    ignore_experts: str = "",
    **options: Any,
) -> SelectionRules:
    """The selection that options stand for: maps are read, expert ids parsed, the rest goes in as it is.

    Raises:
        UserError: as ``SelectionRules``, ``load_expert_map`` and ``parse_expert_ids``.
    """
    from experts.saliency.expert_map import load_expert_map
    from experts.selection.rules import SelectionRules, parse_expert_ids

    return SelectionRules(
        safety=load_expert_map(safety_map) if safety_map else None,
        domain=load_expert_map(domain_map) if domain_map else None,
        ignored=parse_expert_ids(ignore_experts),
        **options,
    )
