"""``fedgraft experts plan``: which experts to prune and which to merge, with the measured loss of each step."""

from __future__ import annotations

import warnings
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
    OverwriteFiles,
    Precision,
    Split,
    print_result,
    progress,
    quiet_libraries,
)
from scripts.shared.expert_options import (
    DomainMap,
    IgnoreExperts,
    Metric,
    MinExperts,
    SafetyMap,
    selection_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from experts.selection.compression_trace import CompressionTrace

_SOURCE = {"files": [], "selection_mode": "model_wide", "action_mode": "plan"}


def plan(
    model: ExpertModel,
    data: DataSources,
    n_prune: Annotated[int, typer.Option(min=0, help="Experts to remove in the whole model, a step each.")],
    out: Annotated[
        Path, typer.Option("--out", "--output", help="Directory of the plan and the expert list.")
    ],
    metric: Metric = "reap",
    min_experts_per_layer: MinExperts = 1,
    safety_map: SafetyMap = None,
    domain_map: DomainMap = None,
    ignore_experts: IgnoreExperts = "",
    alignment: Annotated[
        str,
        typer.Option(
            help="Of neurons before experts are compared and averaged: none (fastest), sign, or centroid."
        ),
    ] = "centroid",
    max_group_size: Annotated[int, typer.Option(min=1, help="Experts that become one, at most.")] = 4,
    split: Split = "train",
    block_size: BlockSize = None,
    max_blocks: Annotated[
        int,
        typer.Option(min=0, help="Blocks per domain, for calibration and for each measurement; 0 for all."),
    ] = 64,
    batch_size: BatchSize = 8,
    precision: Precision = None,
    device: Device = "auto",
    overwrite: OverwriteFiles = False,
    as_json: JsonFlag = False,
) -> None:
    """Plan a smaller model step by step: prune the least salient expert, or merge the most alike pair.

    Both are tried in memory in every step, and the one with the lower perplexity on the held-out documents is taken.
    Saliency and the tokens that experts share come from the documents of --split. Writes compression_plan.csv and an
    expert list for `fedgraft prune` and `fedgraft merge`.
    """
    from configs.errors import UserError
    from configs.output import check_output_file
    from experts.selection.expert_list import CSV_FILE, JSON_FILE, write_expert_list
    from experts.selection.trace_file import PLAN_FILE, write_trace
    from models.moe.planner import PlanOptions, plan_compression
    from models.runtime.perplexity import batches_loss

    quiet_libraries()
    for name in (PLAN_FILE, CSV_FILE, JSON_FILE):
        check_output_file(out / name, overwrite=overwrite)
    if precision == "nf4":
        raise UserError(
            "expected --precision fp32 or bf16, got nf4; experts are averaged, which 4-bit weights do not allow"
        )
    selection = selection_of(
        n_prune=n_prune,
        model_wide=True,
        min_experts_per_layer=min_experts_per_layer,
        safety_map=safety_map,
        domain_map=domain_map,
        ignore_experts=ignore_experts,
    )
    options = PlanOptions(selection, metric, alignment, max_group_size)
    opened = open_model_text(
        model,
        precision=precision,
        device=device,
        block_size=block_size,
        batch_size=batch_size,
        max_blocks=max_blocks,
    )
    calibration, held_out = opened.batches(data, split), list(opened.batches(data, "valid"))
    if split != "train":
        warnings.warn(
            f"--split {split} calibrates on the documents that perplexity is measured on", stacklevel=1
        )
    if not n_prune:
        warnings.warn("nothing to plan with --n-prune 0: all experts stay", stacklevel=1)
    with progress() as on_step:
        found = plan_compression(
            opened.model,
            calibration,
            lambda candidate: batches_loss(candidate, held_out).perplexity,
            options,
            provenance=opened.provenance(data, split),
            on_step=on_step,
        )
    experts = found.expert_list({**_SOURCE, "metric": metric, "model": model, "datasets": list(data)})
    write_trace(found, out / PLAN_FILE)
    csv_path, json_path = write_expert_list(experts, out)
    files = {"csv": str(csv_path), "json": str(json_path), "plan": str(out / PLAN_FILE)}
    equalize = needs_equalizing(opened.model)
    if equalize:
        warnings.warn(
            "layers keep different numbers of experts, which this model's format does not hold: pass --equalize to "
            f"`fedgraft prune` or `fedgraft merge`, so that some come back, or plan with {_even(found)}",
            stacklevel=1,
        )
    result = {**files, **_figures(found), **experts.statistics, "equalize": equalize}
    print_result(result, as_json=as_json, lines=_lines(found, result))


def needs_equalizing(model: PreTrainedModel) -> bool:
    """Whether layers differ in their number of experts in a format whose configuration holds one number for all."""
    from models.moe.views import moe_layers

    layers = moe_layers(model)
    return not layers[0].family.per_layer and len({layer.num_experts for layer in layers}) > 1


def _even(found: CompressionTrace) -> str:
    """Options with which about as many experts go, equally many in every layer."""
    import numpy as np

    counts = (~np.isnan(found.ranks)).sum(axis=1).tolist()
    each = min(-(-len(found.steps) // len(counts)), min(counts) - 1)
    return f"--n-prune {each * len(counts)} --min-experts-per-layer {min(counts) - each}"


def _figures(found: CompressionTrace) -> dict[str, Any]:
    return {
        "steps": found.rows,
        "perplexity_before": found.perplexity_before,
        "perplexity_after": found.perplexity_after,
    }


def _lines(found: CompressionTrace, result: dict[str, Any]) -> list:
    from rich.table import Table

    columns = ("step", "layer:expert", "decoder", "cosine", "Jaccard", "rank", "perplexity", "loss", "other")
    table = Table(*columns, box=None, collapse_padding=True, pad_edge=False)
    before = found.perplexity_before
    for number, step in enumerate(found.steps, start=1):
        other = "" if step.other_perplexity is None else f"{step.other_perplexity - before:+.3f}"
        table.add_row(
            str(number),
            str(step.removal),
            str(step.decoder_layer),
            _figure(step.weight_cosine),
            _figure(step.jaccard),
            f"{step.saliency_rank:g}",
            f"{step.perplexity:.3f}",
            f"{step.perplexity_loss:+.3f}",
            other,
        )
        before = step.perplexity
    total = f"keeps {result['total_kept']} experts, removes {result['total_pruned']}"
    change = f"perplexity {found.perplexity_before:.3f} -> {found.perplexity_after:.3f}"
    legend = ["other: loss of the candidate that was measured, too, and not taken"]
    if any(step.removal.into is not None for step in found.steps):
        legend.append("`fedgraft merge` groups the experts that go by their outputs, not by these pairs")
    wrote = f"wrote {result['plan']}, {result['csv']} and {result['json']}"
    return [table, *legend, f"{total}: {change}", wrote]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
