"""``fedgraft merge``: a checkpoint in which experts have become one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federated.data.model_text import open_model_text
from scripts.shared.console import (
    BatchSize,
    BlockSize,
    DataSources,
    Device,
    ExpertModel,
    JsonFlag,
    Overwrite,
    print_result,
    progress,
    quiet_libraries,
)
from scripts.shared.expert_choice import (
    Equalize,
    ExpertChoice,
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
from scripts.verbs.experts.prune import as_result, result_lines

if TYPE_CHECKING:
    from models.moe.merge import MergeOptions
    from models.moe_files.layout import MoELayout

_OURS = (
    "the experts of a graph are disjoint parts of one dense FFN and share nothing by construction: compare what "
    "merging costs with pruning the same experts"
)


def merge(
    model: ExpertModel,
    data: DataSources,
    expert_list: ExpertLists = None,
    saliency: OptionalSaliencyFiles = None,
    n_prune: NumberToPrune = None,
    similarity_mode: Annotated[
        str, typer.Option(help="gated: outputs weighted by their gates; average: mean outputs.")
    ] = "gated",
    alignment: Annotated[
        str,
        typer.Option(help="Of neurons before averaging: none, sign (flips), or centroid (flips and order)."),
    ] = "centroid",
    max_group_size: Annotated[int, typer.Option(min=1, help="Experts that become one, at most.")] = 4,
    average: Annotated[
        str,
        typer.Option(
            help="What a merged expert is before its refit: the expert that stays (centroid), or an average of its "
            "group by saliency, mean-saliency (REAM) or plain."
        ),
    ] = "centroid",
    refit: Annotated[
        bool, typer.Option(help="Fit merged experts to what their layer gave before, by least squares.")
    ] = True,
    metric: Metric = "reap",
    strategy: Strategy = "bottom",
    model_wide: ModelWide = False,
    min_experts_per_layer: MinExperts = 1,
    safety_map: SafetyMap = None,
    safety_mode: SafetyMode = "protect",
    domain_map: DomainMap = None,
    domain_mode: DomainMode = "protect",
    ignore_experts: IgnoreExperts = "",
    block_size: BlockSize = None,
    max_blocks: Annotated[int, typer.Option(min=0, help="Calibration blocks per domain; 0 for all.")] = 64,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    out: OutDirectory = None,
    preview: Preview = False,
    equalize: Equalize = False,
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Merge experts that go into experts that stay and behave alike, and write the smaller checkpoint.

    Calibrates on the training documents of --data, layer by layer, and measures perplexity on the held-out ones:
    before, merged, and with the same experts pruned instead.
    """
    from configs.output import check_output_directory
    from models.files.side_files import local_checkpoint
    from models.moe.merge import MergeOptions
    from models.moe_files.layout import read_moe_layout

    quiet_libraries()
    plan = MergeOptions(similarity_mode, alignment, max_group_size, average, refit)
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
    targets: list[Path | None] = [None] * len(choices)
    if not preview:
        targets[:] = output_directories(choices, out)
    for target in filter(None, targets):
        check_output_directory(target, overwrite=overwrite)
    opening = {
        "precision": None,
        "device": device,
        "block_size": block_size,
        "batch_size": batch_size,
        "max_blocks": max_blocks,
    }
    results = [
        _merge(layout, choice, plan, target, data, overwrite=overwrite, **opening)
        for choice, target in zip(choices, targets, strict=True)
    ]
    result = results[0] if len(results) == 1 else {"out": out and str(out), "outputs": results}
    print_result(result, as_json=as_json, lines=[line for each in results for line in _lines(each)])


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
    """Merge as one choice says; without ``out`` only tell what would go."""
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
