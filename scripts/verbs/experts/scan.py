"""``fedgraft safety-scan`` and ``fedgraft domain-scan``: which experts stand out on one kind of prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federated.data.model_text import ModelText, open_model_text
from scripts.shared.console import (
    BatchSize,
    BlockSize,
    Device,
    ExpertModel,
    JsonFlag,
    MaxBlocks,
    OverwriteFiles,
    Precision,
    print_result,
    progress,
    quiet_libraries,
)

if TYPE_CHECKING:
    import numpy as np

    from experts.saliency.expert_scan import ExpertScan
    from experts.saliency.measures import Saliency

_SOURCES = "a .txt or .jsonl file, a folder, wikimix:DOMAIN, or a hub dataset; repeatable."
MapFile = Annotated[Path, typer.Option("--out", "--output", help="The new expert map (JSON).")]
Quantile = Annotated[
    float,
    typer.Option(help="Of each layer's scores, from which an expert is flagged: 0.9 for the top tenth."),
]
FrequencyWeight = Annotated[
    float, typer.Option(help="Of routing frequency in the score, 0 to 1; activation has the rest.")
]


def safety_scan(
    model: ExpertModel,
    harmful: Annotated[list[str], typer.Option(help=f"Prompts that should be refused: {_SOURCES}")],
    harmless: Annotated[list[str], typer.Option(help=f"Ordinary prompts: {_SOURCES}")],
    out: MapFile,
    quantile: Quantile = 0.9,
    frequency_weight: FrequencyWeight = 0.5,
    block_size: BlockSize = None,
    max_blocks: MaxBlocks = 0,
    batch_size: BatchSize = 8,
    precision: Precision = None,
    device: Device = "auto",
    overwrite: OverwriteFiles = False,
    as_json: JsonFlag = False,
) -> None:
    """Find the experts that answer harmful prompts more than harmless ones: the safety map for select and prune."""
    _scan(
        "safety",
        {"prompts": harmful, "others": harmless},
        out,
        quantile=quantile,
        frequency_weight=frequency_weight,
        overwrite=overwrite,
        as_json=as_json,
        source=model,
        precision=precision,
        device=device,
        block_size=block_size,
        batch_size=batch_size,
        max_blocks=max_blocks,
    )


def domain_scan(
    model: ExpertModel,
    domain: Annotated[list[str], typer.Option(help=f"Text of the domain: {_SOURCES}")],
    general: Annotated[list[str], typer.Option(help=f"General text: {_SOURCES}")],
    out: MapFile,
    quantile: Quantile = 0.9,
    frequency_weight: FrequencyWeight = 0.5,
    block_size: BlockSize = None,
    max_blocks: MaxBlocks = 0,
    batch_size: BatchSize = 8,
    precision: Precision = None,
    device: Device = "auto",
    overwrite: OverwriteFiles = False,
    as_json: JsonFlag = False,
) -> None:
    """Find the experts that answer a domain more than general text: the domain map for select and prune."""
    _scan(
        "domain",
        {"prompts": domain, "others": general},
        out,
        quantile=quantile,
        frequency_weight=frequency_weight,
        overwrite=overwrite,
        as_json=as_json,
        source=model,
        precision=precision,
        device=device,
        block_size=block_size,
        batch_size=batch_size,
        max_blocks=max_blocks,
    )


def _scan(
    kind: str,
    sets: dict[str, list[str]],
    out: Path,
    *,
    quantile: float,
    frequency_weight: float,
    overwrite: bool,
    as_json: bool,
    **opening: Any,
) -> None:
    """Scan with the two ``sets`` of data sources; ``opening`` says how to open the model."""
    from configs.output import check_output_file
    from experts.saliency.expert_map import save_expert_map
    from experts.saliency.expert_scan import check_scan_options, map_of_scan, scan_experts

    quiet_libraries()
    check_scan_options(quantile=quantile, frequency_weight=frequency_weight)
    check_output_file(out, overwrite=overwrite)
    opened = open_model_text(**opening)
    found = _saliency_of_each(opened, sets)
    scan = scan_experts(found["prompts"], found["others"], frequency_weight=frequency_weight)
    tokens = {name: each.provenance["tokens"] for name, each in found.items()}
    provenance = opened.provenance([], "all") | {"datasets": sets, "tokens": tokens}
    provenance |= {"quantile": quantile, "frequency_weight": frequency_weight}
    expert_map = map_of_scan(scan, kind, quantile=quantile, provenance=provenance)
    decoders = found["prompts"].decoder_layers
    statistics = {"frequency": scan.frequency, "activation": scan.activation, "decoder_layers": decoders}
    save_expert_map(expert_map, out, statistics=statistics)
    flagged = {str(layer): experts.tolist() for layer, experts in expert_map.flagged.items()}
    result = {"out": str(out), "kind": kind, "tokens": tokens, "flagged": flagged, "decoder_layers": decoders}
    print_result(result, as_json=as_json, lines=_lines(result, scan, expert_map.thresholds))


def _saliency_of_each(opened: ModelText, sets: dict[str, list[str]]) -> dict[str, Saliency]:
    from models.moe.saliency_collection import collect_saliency

    batches = {name: opened.batches(sources, "all") for name, sources in sets.items()}
    found = {}
    with progress() as on_step:
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
