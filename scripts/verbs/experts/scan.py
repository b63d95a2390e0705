"""``fedgraft safety-scan`` and ``fedgraft domain-scan``: experts that differ most between two sets of prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federated.data.model_text import ModelText, open_model_text
from scripts.shared.console import print_result, progress, quiet_libraries
from scripts.shared.options import BatchOptions, ExpertModel, JsonFlag, NewFiles, RuntimeOptions
from scripts.shared.verb import verb

if TYPE_CHECKING:
    import numpy as np

    from experts.saliency.expert_scan import ExpertScan
    from experts.saliency.measures import Saliency

_SOURCES = "a text, JSON, CSV or Parquet file, a folder, wikimix:DOMAIN, or a hub dataset; repeatable."


@dataclass(frozen=True)
class ScoreOptions:
    """Score of an expert and the threshold from which it is flagged."""

    quantile: Annotated[
        float,
        typer.Option(
            help="Quantile of a layer's scores from which experts are flagged: 0.9 for the top tenth."
        ),
    ] = 0.9
    frequency_weight: Annotated[
        float,
        typer.Option(help="Weight of routing frequency in the score, 0 to 1; output norm has the rest."),
    ] = 0.5


@verb
def safety_scan(
    model: ExpertModel,
    harmful: Annotated[list[str], typer.Option(help=f"Prompts that a model should refuse: {_SOURCES}")],
    harmless: Annotated[list[str], typer.Option(help=f"Ordinary prompts: {_SOURCES}")],
    write: NewFiles,
    score: ScoreOptions = ScoreOptions(),
    blocks: BatchOptions = BatchOptions(),
    runtime: RuntimeOptions = RuntimeOptions(),
    as_json: JsonFlag = False,
) -> None:
    """Flag the experts that are more active on harmful than on harmless prompts: the safety map of a selection."""
    sets = {"prompts": harmful, "others": harmless}
    _scan("safety", sets, write, score, as_json=as_json, source=model, **vars(blocks), **vars(runtime))


@verb
def domain_scan(
    model: ExpertModel,
    domain: Annotated[list[str], typer.Option(help=f"Text of the domain: {_SOURCES}")],
    general: Annotated[list[str], typer.Option(help=f"General text: {_SOURCES}")],
    write: NewFiles,
    score: ScoreOptions = ScoreOptions(),
    blocks: BatchOptions = BatchOptions(),
    runtime: RuntimeOptions = RuntimeOptions(),
    as_json: JsonFlag = False,
) -> None:
    """Flag the experts that are more active on a domain than on general text: the domain map of a selection."""
    sets = {"prompts": domain, "others": general}
    _scan("domain", sets, write, score, as_json=as_json, source=model, **vars(blocks), **vars(runtime))


def _scan(
    kind: str,
    sets: dict[str, list[str]],
    write: NewFiles,
    score: ScoreOptions,
    *,
    as_json: bool,
    **opening: Any,
) -> None:
    """Compare the saliency of two sets of data sources and write the expert map.

    Args:
        kind: of the map.
        sets: data sources of the ``prompts`` and of the ``others``.
        write: the map's file.
        score: weights and threshold.
        as_json: whether the result is printed as JSON.
        opening: arguments of ``open_model_text``.
    """
    from configs.output import check_output_file
    from experts.saliency.expert_map import save_expert_map
    from experts.saliency.expert_scan import check_scan_options, map_of_scan, scan_experts
    from models.runtime.precision import precision_name

    quiet_libraries()
    check_scan_options(**vars(score))
    check_output_file(write.out, overwrite=write.overwrite)
    opened = open_model_text(**opening)
    precision = precision_name(opened.model)
    found = _saliency_of_each(opened, sets, precision)
    scan = scan_experts(found["prompts"], found["others"], frequency_weight=score.frequency_weight)
    tokens = {name: each.provenance["tokens"] for name, each in found.items()}
    provenance = opened.provenance([], "all") | {"datasets": sets, "tokens": tokens} | vars(score)
    expert_map = map_of_scan(scan, kind, quantile=score.quantile, provenance=provenance)
    decoders = found["prompts"].decoder_layers
    statistics = {"frequency": scan.frequency, "activation": scan.activation, "decoder_layers": decoders}
    save_expert_map(expert_map, write.out, statistics=statistics)
    flagged = {str(layer): experts.tolist() for layer, experts in expert_map.flagged.items()}
    result = {
        "out": str(write.out),
        "kind": kind,
        "tokens": tokens,
        "flagged": flagged,
        "decoder_layers": decoders,
        "precision": precision,
    }
    print_result(result, as_json=as_json, lines=_lines(result, scan, expert_map.thresholds))


def _saliency_of_each(opened: ModelText, sets: dict[str, list[str]], precision: str) -> dict[str, Saliency]:
    from models.moe.saliency_collection import collect_saliency

    batches = {name: opened.batches(sources, "all") for name, sources in sets.items()}
    found = {}
    with progress(precision) as on_step:
        for name in sets:
            stage = f"reading {name}, batches"
            tell = partial(_tell, on_step, stage)
            found[name] = collect_saliency(opened.model, batches[name], on_batch=tell)
    return found


def _tell(on_step: Callable[[str, int, int | None], None], stage: str, done: int) -> None:
    on_step(stage, done, None)


def _lines(result: dict[str, Any], scan: ExpertScan, thresholds: np.ndarray) -> list:
    from rich.table import Table

    table = Table("layer", "decoder", "threshold", "flagged (score, frequency, activation)")
    for (layer, experts), decoder in zip(result["flagged"].items(), result["decoder_layers"], strict=True):
        row = int(layer)
        told = [
            f"{e} ({scan.scores[row, e]:+.2f}, {scan.frequency[row, e]:+.1%}, {scan.activation[row, e]:+.2f})"
            for e in experts
        ]
        table.add_row(layer, str(decoder), f"{thresholds[row]:.2f}", ", ".join(told) or "none")
    total = sum(map(len, result["flagged"].values()))
    return [table, f"flagged {total} experts: wrote {result['out']}"]
