"""``fedgraft experts``: choice of the experts that stay in a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.choices import Action, SelectionMode
from scripts.shared.console import print_result
from scripts.shared.expert_options import MetricOptions, RuleOptions, SaliencyFiles
from scripts.shared.options import JsonFlag, NewFiles
from scripts.shared.verb import verb
from scripts.verbs.experts.plan import plan

if TYPE_CHECKING:
    import numpy as np

    from experts.saliency.measures import Saliency
    from experts.selection.expert_list import ExpertList
    from experts.selection.rules import SelectionRules

experts = typer.Typer(help="Choose the experts that stay in a model.", no_args_is_help=True)


@dataclass(frozen=True)
class SelectOptions(RuleOptions):
    """Scope, number and rank limits of the removed experts."""

    selection_mode: Annotated[
        SelectionMode,
        typer.Option(help="Rank and remove in each layer, or over all layers by score over layer mean."),
    ] = SelectionMode.PER_LAYER
    action: Annotated[
        Action,
        typer.Option(help="Ranks only (analyze), or mark the removed experts as pruned or to be merged."),
    ] = Action.PRUNE
    n_prune: Annotated[
        int,
        typer.Option(
            min=0, help="Experts to remove: per layer, or in all if model_wide; never a shared one."
        ),
    ] = 0
    min_rank: Annotated[
        float | None, typer.Option(help="Smallest rank sum of a removable expert (1 is the best).")
    ] = None
    max_rank: Annotated[
        float | None, typer.Option(help="Largest rank sum of a removable expert (1 is the best).")
    ] = None

    def selection(self) -> SelectionRules:
        """The selection rules, with maps read from their files."""
        from experts.selection.choice import read_selection

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        wide = values.pop("selection_mode") == SelectionMode.MODEL_WIDE
        return read_selection(model_wide=wide, **values)


@experts.command()
@verb
def select(
    saliency: SaliencyFiles,
    write: NewFiles,
    rank: MetricOptions = MetricOptions(),
    pick: SelectOptions = SelectOptions(),
    as_json: JsonFlag = False,
) -> None:
    """Rank experts by one or several saliency files and write the expert list, as a table (CSV) and as JSON.

    Ranks of several files are summed, so that every text has the same weight. Opens no model.
    """
    from configs.output import check_output_file
    from experts.saliency.measures import load_saliency
    from experts.selection.expert_list import CSV_FILE, JSON_FILE, write_expert_list
    from experts.selection.rules import select_experts

    for name in (CSV_FILE, JSON_FILE):
        check_output_file(write.out / name, overwrite=write.overwrite)
    selection = pick.selection()
    files = [str(path) for path in saliency]
    saliencies = [load_saliency(path) for path in saliency]
    if pick.action != Action.ANALYZE:
        _check_models(saliencies)
    chosen = select_experts(saliencies, rank.metric, selection, files=files)
    _warn(pick)
    csv_path, json_path = write_expert_list(chosen, write.out)
    result = {"csv": str(csv_path), "json": str(json_path), **chosen.statistics}
    print_result(result, as_json=as_json, lines=_lines(chosen, result, saliencies[0].decoder_layers))


def _check_models(saliencies: Sequence[Saliency]) -> None:
    """Refuse the saliency of a model that cannot be pruned, where its folder is there."""
    from models.moe_files.layout import read_moe_layout

    for model in dict.fromkeys(str(each.provenance.get("model", "")) for each in saliencies):
        if model and (Path(model) / "config.json").is_file():
            read_moe_layout(Path(model))


def _warn(pick: SelectOptions) -> None:
    """Warn of a number without an action, and of an action without a number."""
    if pick.action != Action.ANALYZE and not pick.n_prune:
        warnings.warn(
            f"nothing to {pick.action}: pass --n-prune, or --action analyze for ranks only", stacklevel=1
        )
    if pick.action == Action.ANALYZE and pick.n_prune:
        warnings.warn("--n-prune is ignored with --action analyze, which removes nothing", stacklevel=1)


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
