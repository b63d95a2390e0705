"""``fedgraft experts``: decide which experts of a model stay."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scripts.shared.console import JsonFlag, OverwriteFiles, print_result
from scripts.shared.expert_options import (
    DomainMap,
    DomainMode,
    IgnoreExperts,
    Metric,
    MinExperts,
    SafetyMap,
    SafetyMode,
    SaliencyFiles,
    Strategy,
    selection_of,
)
from scripts.verbs.experts.plan import plan

if TYPE_CHECKING:
    import numpy as np

    from experts.selection.expert_list import ExpertList

experts = typer.Typer(help="Decide which experts of a model stay.", no_args_is_help=True)


@experts.command()
def select(
    saliency: SaliencyFiles,
    out: Annotated[Path, typer.Option("--out", "--output", help="Directory of the expert list.")],
    metric: Metric = "reap",
    selection_mode: Annotated[
        str,
        typer.Option(
            help="per_layer: rank and remove in each layer; model_wide: over all, scores over layer mean."
        ),
    ] = "per_layer",
    action: Annotated[
        str, typer.Option(help="analyze (ranks only), prune, or merge: removed experts go up into others.")
    ] = "prune",
    n_prune: Annotated[
        int, typer.Option(min=0, help="Experts to remove: per layer, or in all if model_wide.")
    ] = 0,
    min_rank: Annotated[
        float | None, typer.Option(help="Only experts of at least this rank sum may go (1 is the best).")
    ] = None,
    max_rank: Annotated[
        float | None, typer.Option(help="Only experts of at most this rank sum may go (1 is the best).")
    ] = None,
    min_experts_per_layer: MinExperts = 1,
    strategy: Strategy = "bottom",
    safety_map: SafetyMap = None,
    safety_mode: SafetyMode = "protect",
    domain_map: DomainMap = None,
    domain_mode: DomainMode = "protect",
    ignore_experts: IgnoreExperts = "",
    overwrite: OverwriteFiles = False,
    as_json: JsonFlag = False,
) -> None:
    """Rank experts by one or several saliency files and write the expert list, as a table (CSV) and as JSON.

    With several files ranks are summed, so that no text counts for more than another. Opens no model.
    """
    from configs.errors import UserError, nearest
    from configs.output import check_output_file
    from experts.saliency.measures import load_saliency
    from experts.selection.expert_list import CSV_FILE, JSON_FILE, write_expert_list
    from experts.selection.rules import select_experts

    modes = ("per_layer", "model_wide")
    if selection_mode not in modes:
        hint = nearest(selection_mode, modes)
        raise UserError(f"expected --selection-mode {' or '.join(modes)}, got {selection_mode!r}{hint}")
    for name in (CSV_FILE, JSON_FILE):
        check_output_file(out / name, overwrite=overwrite)
    selection = selection_of(
        n_prune=n_prune,
        model_wide=selection_mode == "model_wide",
        strategy=strategy,
        action=action,
        min_rank=min_rank,
        max_rank=max_rank,
        min_experts_per_layer=min_experts_per_layer,
        safety_map=safety_map,
        safety_mode=safety_mode,
        domain_map=domain_map,
        domain_mode=domain_mode,
        ignore_experts=ignore_experts,
    )
    files = [str(path) for path in saliency]
    saliencies = [load_saliency(path) for path in saliency]
    chosen = select_experts(saliencies, metric, selection, files=files)
    if action != "analyze" and not n_prune:
        warnings.warn(
            f"nothing to {action}: pass --n-prune, or --action analyze for ranks only", stacklevel=1
        )
    if action == "analyze" and n_prune:
        warnings.warn("--n-prune is ignored with --action analyze, which removes nothing", stacklevel=1)
    csv_path, json_path = write_expert_list(chosen, out)
    result = {"csv": str(csv_path), "json": str(json_path), **chosen.statistics}
    print_result(result, as_json=as_json, lines=_lines(chosen, result, saliencies[0].decoder_layers))


def _lines(chosen: ExpertList, result: dict, decoder_layers: list[int]) -> list:
    from rich.table import Table

    table = Table("layer", "decoder", "kept", "removed", "experts removed, worst first")
    for layer in range(len(chosen.actions)):
        gone = _removed(chosen.rank_sum[layer], chosen.actions[layer])
        kept = int((chosen.actions[layer] == "keep").sum())
        numbers = (layer, decoder_layers[layer], kept, len(gone))
        table.add_row(*map(str, numbers), ", ".join(map(str, gone)) or "none")
    total = f"keeps {result['total_kept']} experts, removes {result['total_pruned']}"
    return [table, f"{total}: wrote {result['csv']} and {result['json']}"]


def _removed(ranks: np.ndarray, actions: np.ndarray) -> list[int]:
    gone = [expert for expert, action in enumerate(actions) if action in ("prune", "merge")]
    return sorted(gone, key=lambda expert: -ranks[expert])


experts.command()(plan)
