"""``fedgraft saliency collect``: one pass over text, and what every expert did in it."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Annotated

import typer

from federated.data.model_text import open_model_text
from scripts.shared.console import (
    BatchSize,
    BlockSize,
    DataSources,
    Device,
    ExpertModel,
    JsonFlag,
    MaxBlocks,
    OverwriteFiles,
    Precision,
    Split,
    print_result,
    progress,
    quiet_libraries,
)


def collect(
    model: ExpertModel,
    data: DataSources,
    out: Annotated[Path, typer.Option("--out", "--output", help="The new saliency file (.npz).")],
    split: Split = "train",
    block_size: BlockSize = None,
    max_blocks: MaxBlocks = 0,
    batch_size: BatchSize = 8,
    precision: Precision = None,
    device: Device = "auto",
    overwrite: OverwriteFiles = False,
    as_json: JsonFlag = False,
) -> None:
    """Collect saliency: how often each expert is visited, how strongly its gate opens, how much it says.

    An interrupted collection leaves OUT.partial and goes on from there when it is called again in the same way.
    """
    from configs.output import check_output_file
    from experts.saliency.measures import save_saliency
    from models.moe.saliency_collection import collect_saliency

    quiet_libraries()
    check_output_file(out, overwrite=overwrite)
    opened = open_model_text(
        model,
        precision=precision,
        device=device,
        block_size=block_size,
        batch_size=batch_size,
        max_blocks=max_blocks,
    )
    batches = opened.batches(data, split)
    start, partial = monotonic(), out.with_name(out.name + ".partial")
    with progress() as on_step:
        saliency = collect_saliency(
            opened.model,
            batches,
            provenance=opened.provenance(data, split),
            partial=partial,
            on_batch=lambda done: on_step("collecting saliency, batches", done, None),
        )
    seconds = monotonic() - start
    save_saliency(saliency, out)
    partial.unlink(missing_ok=True)
    result = {"out": str(out), "tokens": saliency.provenance["tokens"], "seconds": seconds}
    print_result(result, as_json=as_json, lines=[_line(result)])


def _line(result: dict) -> str:
    return f"wrote {result['out']}: {result['tokens']:,} tokens in {result['seconds']:.1f} s"
