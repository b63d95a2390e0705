"""``fedgraft prune``: a checkpoint with fewer experts."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from scripts.shared.console import print_result, progress, quiet_libraries
from scripts.shared.expert_options import ChoiceOptions
from scripts.shared.options import ExpertModel, JsonFlag, ShrunkCheckpoints
from scripts.shared.verb import verb

if TYPE_CHECKING:
    from models.moe_files.layout import MoELayout
    from models.moe_files.prune import PruneReport


@verb
def prune(
    model: ExpertModel,
    pick: ChoiceOptions = ChoiceOptions(),
    write: ShrunkCheckpoints = ShrunkCheckpoints(),
    as_json: JsonFlag = False,
) -> None:
    """Write a checkpoint without the experts that an expert list or the saliency removes.

    Reads and writes 1 MiB at a time, for models of any size. The edges of an expert graph are rewired around the
    removed experts; formats whose configuration holds one number of experts need equally many in every layer
    (--equalize).
    """
    from configs.output import check_free_space, check_output_directory
    from experts.selection.choice import output_directories
    from models.files.side_files import local_checkpoint
    from models.moe_files.layout import read_moe_layout
    from models.moe_files.prune import preview_prune, prune_checkpoint

    quiet_libraries()
    source = local_checkpoint(model)
    layout = read_moe_layout(source)
    choices = pick.choices(layout, equalize=write.equalize, as_json=as_json)
    # All targets are checked before the first checkpoint is written.
    targets = [] if write.preview else output_directories(choices, write.out)
    for target in targets:
        check_output_directory(target, overwrite=write.overwrite)
    reports = [preview_prune(source, choice.keep_map) for choice in choices]
    check_free_space({path: report.bytes_after for path, report in zip(targets, reports, strict=False)})
    for warning in dict.fromkeys(text for report in reports for text in report.warnings):
        warnings.warn(warning, stacklevel=1)
    if not write.preview:
        with progress() as on_step:
            reports = [
                prune_checkpoint(source, target, choice.keep_map, on_step=on_step, overwrite=write.overwrite)
                for target, choice in zip(targets, choices, strict=True)
            ]
    results = [as_result(report, layout) for report in reports]
    lines = [line for each in results for line in result_lines(each)]
    print_result(joint_result(results, write), as_json=as_json, lines=lines)


def joint_result(results: list[dict], write: ShrunkCheckpoints) -> dict:
    """The only result, or the results of several expert lists under ``outputs``."""
    if len(results) == 1:
        return results[0]
    return {"out": write.out and str(write.out), "outputs": results}


def as_result(report: PruneReport, layout: MoELayout) -> dict:
    """The report as JSON values, with the removed experts and the decoder index of each MoE layer."""
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
