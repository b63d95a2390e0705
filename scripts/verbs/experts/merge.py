"""``fedgraft merge``: a checkpoint in which similar experts are merged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.choices import Alignment, Average, Device, Similarity
from federated.data.model_text import open_model_text
from scripts.shared.console import print_result, progress, quiet_libraries
from scripts.shared.expert_options import AlignmentOption, ChoiceOptions, MaxGroupSize
from scripts.shared.options import (
    BatchOptions,
    DataSources,
    DeviceOption,
    ExpertModel,
    JsonFlag,
    ShrunkCheckpoints,
)
from scripts.shared.verb import verb
from scripts.verbs.experts.prune import as_result, joint_result, result_lines

if TYPE_CHECKING:
    from experts.selection.choice import ExpertChoice
    from models.moe.merge import MergeOptions
    from models.moe_files.layout import MoELayout

_OURS = (
    "the experts of a graph are disjoint parts of one dense FFN and share nothing by construction: compare what "
    "merging costs with pruning the same experts"
)


@dataclass(frozen=True)
class GroupOptions:
    """Groups of experts that are merged, and the weights of the merged expert."""

    similarity_mode: Annotated[
        Similarity,
        typer.Option(
            help="Cosine similarity of experts by outputs times gate weights (gated) or by mean outputs."
        ),
    ] = Similarity.GATED
    alignment: AlignmentOption = Alignment.CENTROID
    max_group_size: MaxGroupSize = 4
    average: Annotated[
        Average,
        typer.Option(
            help="Weights of a merged expert before its refit: those of the expert that stays (centroid), or an "
            "average of its group weighted by summed saliency, mean saliency (REAM), or equally (plain)."
        ),
    ] = Average.CENTROID
    refit: Annotated[
        bool,
        typer.Option(
            help="Refit the down projections of merged experts to the layer's previous output (ridge)."
        ),
    ] = True

    def merge_options(self) -> MergeOptions:
        """The options in the terms of the library."""
        from models.moe.merge import MergeOptions

        return MergeOptions(
            self.similarity_mode, self.alignment, self.max_group_size, self.average, self.refit
        )


@verb
def merge(
    model: ExpertModel,
    data: DataSources,
    pick: ChoiceOptions = ChoiceOptions(),
    group: GroupOptions = GroupOptions(),
    blocks: BatchOptions = BatchOptions(max_blocks=64),
    device: DeviceOption = Device.AUTO,
    write: ShrunkCheckpoints = ShrunkCheckpoints(),
    as_json: JsonFlag = False,
) -> None:
    """Merge each removed expert into the most similar one that stays, and write the smaller checkpoint.

    Calibrates on the training documents of --data, layer by layer, and measures perplexity on the held-out ones:
    before, merged, and with the same experts pruned instead.
    """
    from configs.output import check_output_directory
    from experts.selection.choice import output_directories
    from models.files.side_files import local_checkpoint
    from models.moe_files.layout import read_moe_layout

    quiet_libraries()
    options = group.merge_options()
    layout = read_moe_layout(local_checkpoint(model))
    choices = pick.choices(layout.experts_per_layer, equalize=write.equalize, as_json=as_json)
    targets: list[Path | None] = [None] * len(choices)
    if not write.preview:
        targets[:] = output_directories(choices, write.out)
    for target in filter(None, targets):
        check_output_directory(target, overwrite=write.overwrite)
    opening = {"precision": None, "device": device, **vars(blocks)}
    results = [
        _merge(layout, choice, options, target, data, overwrite=write.overwrite, **opening)
        for choice, target in zip(choices, targets, strict=True)
    ]
    lines = [line for each in results for line in _lines(each)]
    print_result(joint_result(results, write), as_json=as_json, lines=lines)


def _merge(
    layout: MoELayout,
    choice: ExpertChoice,
    plan: MergeOptions,
    out: Path | None,
    data: list[str],
    *,
    overwrite: bool,
    **opening: Any,
) -> dict[str, Any]:
    """Merge the experts of one choice; without ``out`` only list the removed experts."""
    from models.moe.merge import merge_experts
    from models.moe.remove import keep_experts
    from models.moe_files.layout import read_moe_layout
    from models.moe_files.prune import preview_prune
    from models.moe_files.save_merged import save_merged
    from models.runtime.perplexity import batches_loss

    report = preview_prune(layout.source, choice.keep_map)
    result = as_result(report, layout)
    if out is None:
        return result
    opened = open_model_text(str(layout.source), **opening)
    calibration, held_out = (list(opened.batches(data, split)) for split in ("train", "valid"))
    before = batches_loss(opened.model, held_out).perplexity
    with progress() as on_step:
        groups = merge_experts(opened.model, calibration, choice.keep_map, plan, on_step=on_step)
    merged = batches_loss(opened.model, held_out).perplexity
    version = layout.config.get("graph_version", 0) + 1
    save_merged(opened.model, layout.source, out, graph_version=version, overwrite=overwrite)
    pruned = keep_experts(open_model_text(str(layout.source), **opening).model, choice.keep_map)
    return result | {
        "out": str(out),
        "bytes_after": read_moe_layout(out).weight_bytes,
        "groups": {str(layer): list(each.values()) for layer, each in enumerate(groups)},
        "perplexity": {
            "before": before,
            "merged": merged,
            "pruned": batches_loss(pruned, held_out).perplexity,
        },
        "note": _OURS if layout.family.per_layer else None,
    }


def _lines(result: dict[str, Any]) -> list:
    lines = result_lines(result)
    if "groups" not in result:
        return lines
    for layer, groups in result["groups"].items():
        told = ", ".join("+".join(map(str, group)) for group in groups if len(group) > 1)
        lines.append(f"layer {layer}: {told or 'nothing merged'}")
    found = result["perplexity"]
    cost = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    return [*lines, f"perplexity on held-out documents: {cost}", *filter(None, [result["note"]])]
