"""``fedgraft saliency``: collection, tables, differences and sums of saliency files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from scripts.shared.console import print_result
from scripts.shared.expert_options import MetricOptions
from scripts.shared.options import JsonFlag, NewFiles
from scripts.shared.verb import verb
from scripts.verbs.experts.saliency_collect import collect

saliency = typer.Typer(help="Measure the saliency of every expert of a model.", no_args_is_help=True)
saliency.command()(collect)


@dataclass(frozen=True)
class ReportOptions(MetricOptions):
    """Saliency measure and length of a report on saliency files."""

    top: Annotated[int, typer.Option(min=1, help="Experts listed per layer.")] = 4


@saliency.command()
@verb
def show(
    file: Annotated[Path, typer.Argument(help="Saliency file.")],
    report: ReportOptions = ReportOptions(),
    as_json: JsonFlag = False,
) -> None:
    """Show the best, worst and never routed experts of each layer."""
    from experts.saliency.measures import load_saliency
    from experts.saliency.saliency_report import layer_summaries

    loaded = load_saliency(file)
    layers = layer_summaries(loaded, report.metric, top=report.top)
    result = {
        "file": str(file),
        "metric": report.metric,
        "num_layers": loaded.num_layers,
        "num_experts": loaded.num_experts,
        "layers": layers,
        "provenance": loaded.provenance,
    }
    print_result(result, as_json=as_json, lines=_show_lines(result))


@saliency.command()
@verb
def diff(
    before: Annotated[Path, typer.Argument(help="Saliency file.")],
    after: Annotated[Path, typer.Argument(help="Saliency file of the same layers and experts.")],
    report: ReportOptions = ReportOptions(),
    as_json: JsonFlag = False,
) -> None:
    """Compare the ranks of the experts of each layer in two saliency files.

    Prints Spearman's rank correlation, the overlap of the worst quarters, and the largest changes of rank.
    """
    from experts.saliency.measures import load_saliency
    from experts.saliency.saliency_report import compare_layers

    layers = compare_layers(load_saliency(before), load_saliency(after), report.metric, top=report.top)
    known = [layer["spearman"] for layer in layers if layer["spearman"] is not None]
    overlap = sum(layer["bottom_quarter_overlap"] for layer in layers) / len(layers)
    result = {
        "before": str(before),
        "after": str(after),
        "metric": report.metric,
        "spearman": sum(known) / len(known) if known else None,
        "bottom_quarter_overlap": overlap,
        "layers": layers,
    }
    print_result(result, as_json=as_json, lines=_diff_lines(result))


@saliency.command()
@verb
def merge(
    files: Annotated[list[Path], typer.Argument(help="Saliency files of one model, on different texts.")],
    write: NewFiles,
    as_json: JsonFlag = False,
) -> None:
    """Add the sums of several saliency files of one model: the saliency of all their texts.

    Sums of ranks are no saliency file but an expert list: fedgraft experts select --action analyze, with several
    --saliency.
    """
    from configs.errors import UserError
    from configs.output import check_output_file
    from experts.saliency.measures import add_saliency, load_saliency, save_saliency

    if len({path.resolve() for path in files}) < max(2, len(files)):
        raise UserError(f"expected at least two different saliency files, got {', '.join(map(str, files))}")
    check_output_file(write.out, overwrite=write.overwrite)
    merged = add_saliency([load_saliency(path) for path in files])
    save_saliency(merged, write.out)
    result = {
        "out": str(write.out),
        "files": [str(path) for path in files],
        "num_layers": merged.num_layers,
        "num_experts": merged.num_experts,
        "tokens": merged.provenance.get("tokens"),
    }
    print_result(result, as_json=as_json, lines=[f"wrote {write.out}: the sums of {len(files)} files"])


def _show_lines(result: dict[str, Any]) -> list:
    from rich.table import Table

    table = Table("layer", "decoder", "experts", f"best by {result['metric']}", "worst", "never routed")
    for layer in result["layers"]:
        scored = [_with_scores(layer[name], layer["scores"]) for name in ("best", "worst")]
        never = ", ".join(map(str, layer["never_routed"])) or "none"
        count = f"{layer['experts']} ({layer['shared']} shared)" if layer["shared"] else str(layer["experts"])
        table.add_row(str(layer["layer"]), str(layer["decoder_layer"]), count, *scored, never)
    return [table]


def _with_scores(experts: list[int], scores: list[float]) -> str:
    return ", ".join(f"{expert}:{scores[expert]:.3g}" for expert in experts)


def _diff_lines(result: dict[str, Any]) -> list:
    from rich.table import Table

    table = Table("layer", "decoder", "Spearman", "worst quarter shared", "largest rank changes")
    for layer in result["layers"]:
        table.add_row(
            str(layer["layer"]),
            str(layer["decoder_layer"]),
            _correlation(layer["spearman"]),
            f"{layer['bottom_quarter_overlap']:.0%}",
            ", ".join(_change(change) for change in layer["largest_changes"]) or "none",
        )
    mean = f"mean Spearman {_correlation(result['spearman'])}"
    return [table, f"{mean}, worst quarter shared {result['bottom_quarter_overlap']:.0%}"]


def _correlation(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _change(change: dict[str, Any]) -> str:
    return f"{change['expert']}:{change['rank_before']:g}->{change['rank_after']:g}"
