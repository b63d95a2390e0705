"""``fedgraft experts plan``: steps of pruning and merging with the measured perplexity of each."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.choices import Precision, Split
from federated.data.model_text import open_model_text
from scripts.shared.console import print_result, progress, quiet_libraries
from scripts.shared.expert_options import AveragingOptions, MetricOptions, ProtectionOptions
from scripts.shared.options import (
    CALIBRATION_BLOCKS,
    BatchOptions,
    DataSources,
    ExpertModel,
    JsonFlag,
    NewFiles,
    RuntimeOptions,
    SplitOption,
)
from scripts.shared.verb import verb

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from experts.selection.compression_trace import CompressionTrace
    from experts.selection.expert_list import ExpertList
    from federated.data.model_text import ModelText
    from models.moe.planner import PlanOptions

_SOURCE = {"files": [], "selection_mode": "model_wide", "action_mode": "plan"}


@dataclass(frozen=True)
class StepOptions(AveragingOptions, MetricOptions, ProtectionOptions):
    """Candidates of a step and the number of steps."""

    def plan_options(self, n_prune: int) -> PlanOptions:
        """The options in the terms of the library."""
        from experts.selection.choice import read_selection
        from models.moe.planner import PlanOptions

        selection = read_selection(
            n_prune=n_prune,
            model_wide=True,
            **{field.name: getattr(self, field.name) for field in fields(ProtectionOptions)},
        )
        return PlanOptions(selection, self.metric, self.alignment, self.max_group_size)


@verb
def plan(
    model: ExpertModel,
    data: DataSources,
    n_prune: Annotated[int, typer.Option(min=0, help="Experts to remove in the whole model, one per step.")],
    write: NewFiles,
    steps: StepOptions = StepOptions(),
    split: SplitOption = Split.TRAIN,
    blocks: BatchOptions = CALIBRATION_BLOCKS,
    runtime: RuntimeOptions = RuntimeOptions(),
    as_json: JsonFlag = False,
) -> None:
    """Plan a smaller model step by step: prune the least salient expert, or merge the most similar pair.

    Each step tries both in memory and takes the one with the lower perplexity on the held-out documents. Saliency and
    shared tokens come from the documents of --split. Writes compression_plan.csv, whose steps `fedgraft merge
    --plan` executes, and an expert list for `fedgraft prune` and `fedgraft merge`.
    """
    from configs.output import check_output_file
    from experts.selection.expert_list import CSV_FILE, JSON_FILE
    from experts.selection.trace_file import PLAN_FILE
    from models.runtime.precision import precision_name

    quiet_libraries()
    for name in (PLAN_FILE, CSV_FILE, JSON_FILE):
        check_output_file(write.out / name, overwrite=write.overwrite)
    _check(runtime, split, n_prune)
    options = steps.plan_options(n_prune)
    opened = open_model_text(model, **vars(runtime), **vars(blocks))
    precision = precision_name(opened.model)
    found = _plan(opened, data, split, options, precision)
    experts = found.expert_list({**_SOURCE, "metric": steps.metric, "model": model, "datasets": list(data)})
    result = (
        _write(found, experts, write.out) | _figures(found) | experts.statistics | {"precision": precision}
    )
    # The key keeps the spelling of stored results.
    result["equalise"] = needs_equalizing(opened.model)
    if result["equalise"]:
        warnings.warn(
            "layers keep different numbers of experts, which this model's format does not hold: pass --equalize to "
            f"`fedgraft prune` or `fedgraft merge`, so that some come back, or plan with {_even(found)}",
            stacklevel=1,
        )
    print_result(result, as_json=as_json, lines=_lines(found, result))


def _check(runtime: RuntimeOptions, split: Split, n_prune: int) -> None:
    """Refuse 4-bit weights; warn of calibration on held-out documents and of an empty plan."""
    from configs.errors import UserError

    if runtime.precision == Precision.NF4:
        raise UserError(
            "expected --precision auto, fp32 or bf16, got nf4; experts are averaged, which 4-bit weights do not allow"
        )
    if split != Split.TRAIN:
        warnings.warn(
            f"--split {split} calibrates on the documents that perplexity is measured on", stacklevel=1
        )
    if not n_prune:
        warnings.warn("nothing to plan with --n-prune 0: all experts stay", stacklevel=1)


def _plan(
    opened: ModelText, data: list[str], split: Split, options: PlanOptions, precision: str
) -> CompressionTrace:
    from models.moe.planner import plan_compression
    from models.runtime.perplexity import batches_loss

    calibration, held_out = opened.batches(data, split), list(opened.batches(data, "valid"))
    with progress(precision) as on_step:
        return plan_compression(
            opened.model,
            calibration,
            lambda candidate: batches_loss(candidate, held_out).perplexity,
            options,
            provenance=opened.provenance(data, split),
            on_step=on_step,
        )


def _write(found: CompressionTrace, experts: ExpertList, out: Path) -> dict[str, Any]:
    from experts.selection.expert_list import write_expert_list
    from experts.selection.trace_file import PLAN_FILE, write_trace

    write_trace(found, out / PLAN_FILE)
    csv_path, json_path = write_expert_list(experts, out)
    return {"csv": str(csv_path), "json": str(json_path), "plan": str(out / PLAN_FILE)}


def needs_equalizing(model: PreTrainedModel) -> bool:
    """Whether layers differ in their number of experts in a format whose configuration holds one number for all."""
    from models.moe.views import moe_layers

    layers = moe_layers(model)
    return not layers[0].family.holds([layer.num_experts for layer in layers])


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
        legend.append(
            "`fedgraft merge --plan` executes these steps; with the expert list it groups experts by outputs"
        )
    wrote = f"wrote {result['plan']}, {result['csv']} and {result['json']}"
    return [table, *legend, f"{total}: {change}", wrote]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
