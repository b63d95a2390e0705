"""``fedgraft merge``: a checkpoint in which similar experts are merged."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.choices import Average, Device, Precision, Similarity
from federated.data.model_text import open_model_text
from scripts.shared.console import print_result, progress, quiet_libraries
from scripts.shared.expert_options import AveragingOptions, ChoiceOptions
from scripts.shared.options import (
    CALIBRATION_BLOCKS,
    BatchOptions,
    DataSources,
    DeviceOption,
    ExpertModel,
    JsonFlag,
    ShrunkCheckpoints,
)
from scripts.shared.verb import given_options, verb
from scripts.verbs.experts.prune import as_result, joint_result, result_lines

if TYPE_CHECKING:
    from experts.selection.choice import ExpertChoice
    from experts.selection.compression_trace import Step
    from federated.data.model_text import ModelText
    from models.moe.merge import MergeOptions
    from models.moe_files.layout import MoELayout

# Relative difference of the plan's and the measured perplexity above which a warning is given.
_PLAN_TOLERANCE = 1e-3


@dataclass(frozen=True)
class GroupOptions(AveragingOptions):
    """Groups of experts that are merged, and the weights of the merged expert."""

    similarity_mode: Annotated[
        Similarity,
        typer.Option(
            help="Cosine similarity of experts by outputs times gate weights (gated) or by mean outputs."
        ),
    ] = Similarity.GATED
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
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Compression plan (CSV) of `fedgraft experts plan`: executes exactly its measured steps, in place of "
            "a choice of experts."
        ),
    ] = None,
    pick: ChoiceOptions = ChoiceOptions(),
    group: GroupOptions = GroupOptions(),
    blocks: BatchOptions = CALIBRATION_BLOCKS,
    device: DeviceOption = Device.AUTO,
    write: ShrunkCheckpoints = ShrunkCheckpoints(),
    as_json: JsonFlag = False,
) -> None:
    """Merge each removed expert into the most similar one that stays, and write the smaller checkpoint.

    Calibrates on the training documents of --data, layer by layer, or executes the steps of --plan. Measures perplexity
    on the held-out documents: before, merged, and with the same experts pruned instead.
    """
    from configs.output import check_output_directory
    from experts.selection.choice import output_directories
    from experts.selection.trace_file import read_trace
    from models.files.side_files import local_checkpoint
    from models.moe_files.layout import read_moe_layout

    quiet_libraries()
    options = group.merge_options()
    layout = read_moe_layout(local_checkpoint(model))
    steps = None if plan is None else read_trace(plan)
    choices = (
        pick.choices(layout, equalize=write.equalize, as_json=as_json)
        if steps is None
        else [_planned(layout, steps)]
    )
    targets: list[Path | None] = [None] * len(choices)
    if not write.preview:
        targets[:] = output_directories(choices, write.out)
    for target in filter(None, targets):
        check_output_directory(target, overwrite=write.overwrite)
    opening = {"precision": Precision.AUTO, "device": device, **vars(blocks)}
    _check_room(layout, choices, targets)
    results = [
        _merge(layout, choice, target, data, options if steps is None else steps, write.overwrite, opening)
        for choice, target in zip(choices, targets, strict=True)
    ]
    lines = [line for each in results for line in _lines(each)]
    print_result(joint_result(results, write), as_json=as_json, lines=lines)


def _check_room(layout: MoELayout, choices: Sequence[ExpertChoice], targets: Sequence[Path | None]) -> None:
    """Check that the file systems have room for the checkpoints, which are as large as pruned ones."""
    from configs.output import check_free_space
    from models.moe_files.prune import preview_prune

    chosen = [(path, choice) for path, choice in zip(targets, choices, strict=True) if path]
    sizes = {path: preview_prune(layout.source, choice.keep_map).bytes_after for path, choice in chosen}
    check_free_space(sizes)


def _planned(layout: MoELayout, steps: Sequence[Step]) -> ExpertChoice:
    """Experts that a compression plan keeps; options of another choice or another merge are refused beside it."""
    from configs.errors import UserError
    from experts.selection.choice import ExpertChoice
    from models.moe_files.save_merged import planned_keep_map

    chosen = {field.name for kind in (ChoiceOptions, GroupOptions) for field in fields(kind)} | {"equalize"}
    if others := sorted(f"--{name.replace('_', '-')}" for name in given_options() & chosen):
        raise UserError(
            f"expected --plan without {', '.join(others)}: the steps of a plan are executed as they were measured"
        )
    return ExpertChoice(planned_keep_map(layout, steps), {})


def _merge(
    layout: MoELayout,
    choice: ExpertChoice,
    out: Path | None,
    data: list[str],
    how: MergeOptions | Sequence[Step],
    overwrite: bool,
    opening: dict[str, Any],
) -> dict[str, Any]:
    """Merge the experts of one choice, or execute a plan; without ``out`` only list the removed experts."""
    from models.moe.remove import experts_removed
    from models.moe_files.layout import read_moe_layout
    from models.moe_files.prune import preview_prune
    from models.moe_files.save_merged import save_merged
    from models.runtime.perplexity import batches_loss
    from models.runtime.precision import precision_name

    preview = preview_prune(layout.source, choice.keep_map)
    for text in preview.warnings:
        warnings.warn(text, stacklevel=1)
    result = as_result(preview, layout)
    if out is None:
        return result
    opened = open_model_text(str(layout.source), **opening)
    held_out = list(opened.batches(data, "valid"))
    perplexity = {"before": batches_loss(opened.model, held_out).perplexity}
    with experts_removed(opened.model, choice.keep_map) as pruned:
        pruned_perplexity = batches_loss(pruned, held_out).perplexity
    groups = _execute(opened, data, choice, how)
    perplexity |= {"merged": batches_loss(opened.model, held_out).perplexity, "pruned": pruned_perplexity}
    save_merged(opened.model, layout.source, out, config=preview.config, overwrite=overwrite)
    return result | {
        "out": str(out),
        "bytes_after": read_moe_layout(out).weight_bytes,
        "groups": {str(layer): list(each.values()) for layer, each in enumerate(groups)},
        "precision": precision_name(opened.model),
        "perplexity": perplexity | _planned_perplexity(how, perplexity["merged"]),
        "note": layout.family.merge_note or None,
    }


def _execute(
    opened: ModelText, data: list[str], choice: ExpertChoice, how: MergeOptions | Sequence[Step]
) -> list[dict[int, list[int]]]:
    from models.moe.merge import MergeOptions, merge_experts
    from models.moe.replay import replay_trace
    from models.runtime.precision import precision_name

    with progress(precision_name(opened.model)) as on_step:
        if isinstance(how, MergeOptions):
            calibration = list(opened.batches(data, "train"))
            return merge_experts(opened.model, calibration, choice.keep_map, how, on_step=on_step)
        return replay_trace(opened.model, how, on_step=on_step)


def _planned_perplexity(how: MergeOptions | Sequence[Step], merged: float) -> dict[str, float]:
    """Perplexity after the last step of a plan; warns where the merged model's differs by more than 0.1 %."""
    from models.moe.merge import MergeOptions

    if isinstance(how, MergeOptions) or not how:
        return {}
    planned = how[-1].perplexity
    if not abs(merged - planned) <= _PLAN_TOLERANCE * planned:
        warnings.warn(
            f"the plan measured perplexity {planned:.4f}, the merged model has {merged:.4f}: on other text, blocks or "
            "precision than the plan's",
            stacklevel=1,
        )
    return {"planned": planned}


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
