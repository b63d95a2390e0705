"""``fedgraft prune``: a checkpoint with fewer experts."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated

import typer

from scripts.shared.console import JsonFlag, Overwrite, print_result, progress, quiet_libraries
from scripts.shared.expert_choice import (
    Equalize,
    ExpertLists,
    ModelWide,
    NumberToPrune,
    OptionalSaliencyFiles,
    OutDirectory,
    Preview,
    choose_experts,
    output_directories,
)
from scripts.shared.expert_options import (
    DomainMap,
    DomainMode,
    IgnoreExperts,
    Metric,
    MinExperts,
    SafetyMap,
    SafetyMode,
    Strategy,
)

if TYPE_CHECKING:
    from models.moe_files.layout import MoELayout
    from models.moe_files.prune import PruneReport


def prune(
    model: Annotated[
        str, typer.Option(help="Directory or hub id of an expert graph or a Hugging Face mixture of experts.")
    ],
    expert_list: ExpertLists = None,
    saliency: OptionalSaliencyFiles = None,
    n_prune: NumberToPrune = None,
    metric: Metric = "reap",
    strategy: Strategy = "bottom",
    model_wide: ModelWide = False,
    min_experts_per_layer: MinExperts = 1,
    safety_map: SafetyMap = None,
    safety_mode: SafetyMode = "protect",
    domain_map: DomainMap = None,
    domain_mode: DomainMode = "protect",
    ignore_experts: IgnoreExperts = "",
    out: OutDirectory = None,
    preview: Preview = False,
    equalize: Equalize = False,
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a checkpoint without some of its experts, as an expert list or the saliency says.

    Reads and writes a MiB at a time, whatever the size of the model. An expert graph is rewired around the experts that
    go; formats whose configuration holds one number of experts need equally many in every layer (--equalize).
    """
    from configs.output import check_output_directory
    from models.files.side_files import local_checkpoint
    from models.moe_files.layout import read_moe_layout
    from models.moe_files.prune import preview_prune, prune_checkpoint

    quiet_libraries()
    source = local_checkpoint(model)
    layout = read_moe_layout(source)
    choices = choose_experts(
        layout.experts_per_layer,
        expert_list=expert_list,
        saliency=saliency,
        n_prune=n_prune,
        metric=metric,
        equalize=equalize,
        as_json=as_json,
        strategy=strategy,
        model_wide=model_wide,
        min_experts_per_layer=min_experts_per_layer,
        safety_map=safety_map,
        safety_mode=safety_mode,
        domain_map=domain_map,
        domain_mode=domain_mode,
        ignore_experts=ignore_experts,
    )
    # All are checked before the first is written.
    targets = [] if preview else output_directories(choices, out)
    for target in targets:
        check_output_directory(target, overwrite=overwrite)
    reports = [preview_prune(source, choice.keep_map) for choice in choices]
    for warning in dict.fromkeys(text for report in reports for text in report.warnings):
        warnings.warn(warning, stacklevel=1)
    if not preview:
        with progress() as on_step:
            reports = [
                prune_checkpoint(source, target, choice.keep_map, on_step=on_step, overwrite=overwrite)
                for target, choice in zip(targets, choices, strict=True)
            ]
    results = [as_result(report, layout) for report in reports]
    result = results[0] if len(results) == 1 else {"out": out and str(out), "outputs": results}
    print_result(result, as_json=as_json, lines=[line for each in results for line in result_lines(each)])


def as_result(report: PruneReport, layout: MoELayout) -> dict:
    """The report as plain values, with what went and the decoder index of each MoE layer beside it."""
    removed = {
        layer.ordinal: sorted(set(range(layer.num_experts)) - set(report.keep_map[layer.ordinal].tolist()))
        for layer in layout.layers
    }
    return {
        "out": str(report.out) if report.out else None,
        "keep_map": {str(layer): kept.tolist() for layer, kept in report.keep_map.items()},
        "removed": {str(layer): experts for layer, experts in removed.items()},
        "decoder_layers": layout.decoder_layers,
        "parameters_before": report.parameters_before,
        "parameters_after": report.parameters_after,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "warnings": list(report.warnings),
    }


def result_lines(result: dict) -> list:
    """A table of the layers, and the sizes before and after."""
    from rich.table import Table

    table = Table("layer", "decoder layer", "kept", "removed", "experts removed")
    for (layer, gone), decoder_layer in zip(result["removed"].items(), result["decoder_layers"], strict=True):
        kept, names = len(result["keep_map"][layer]), ", ".join(map(str, gone)) or "none"
        table.add_row(layer, str(decoder_layer), str(kept), str(len(gone)), names)
    sizes = [
        f"{what}: {result[f'{what}_before']:,} -> {result[f'{what}_after']:,} "
        f"({result[f'{what}_after'] / result[f'{what}_before']:.1%})"
        for what in ("parameters", "bytes")
    ]
    return [table, *sizes, f"wrote {result['out']}" if result["out"] else "preview: nothing was written"]
