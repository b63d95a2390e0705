"""``fedgraft saliency collect``: one pass over text, and what every expert did in it."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Annotated

import typer

from scripts.console import (
    BatchSize,
    BlockSize,
    DataSources,
    Device,
    JsonFlag,
    MaxBlocks,
    Overwrite,
    Precision,
    Split,
    print_result,
    progress,
    quiet_libraries,
)


def collect(
    model: Annotated[
        str, typer.Option(help="Directory or hub id of a graph or a Hugging Face mixture of experts.")
    ],
    data: DataSources,
    out: Annotated[Path, typer.Option("--out", "--output", help="The new saliency file (.npz).")],
    split: Split = "train",
    block_size: BlockSize = None,
    max_blocks: MaxBlocks = 0,
    batch_size: BatchSize = 8,
    precision: Precision = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Collect saliency: how often each expert is visited, how strongly its gate opens, how much it says.

    An interrupted collection leaves OUT.partial and goes on from there when it is called again in the same way.
    """
    from configs.output import check_output_file
    from experts.saliency import save_saliency
    from federated.text_batches import text_batches, texts_by_domain
    from models.fingerprint import checkpoint_fingerprint
    from models.llama_loader import load_causal_lm, load_tokenizer
    from models.moe_view import moe_layers, router_kind
    from models.precision import choose_device
    from models.saliency_collection import collect_saliency

    quiet_libraries()
    check_output_file(out, overwrite=overwrite)
    texts = texts_by_domain(data, split)
    lm = load_causal_lm(model, precision=precision, device=choose_device(device))
    moe_layers(lm)
    context = lm.config.max_position_embeddings
    size = block_size or min(256, context)
    provenance = {
        "model": model,
        "model_fingerprint": checkpoint_fingerprint(model),
        "router": str(router_kind(lm.config)),
        "datasets": data,
        "split": split,
        "block_size": size,
        "max_blocks": max_blocks,
        "batch_size": batch_size,
    }
    batches = text_batches(
        texts.values(),
        load_tokenizer(model),
        block_size=size,
        batch_size=batch_size,
        max_blocks=max_blocks,
        max_position_embeddings=context,
    )
    start = monotonic()
    with progress() as on_step:
        saliency = collect_saliency(
            lm,
            batches,
            provenance=provenance,
            partial=out.with_name(out.name + ".partial"),
            on_batch=lambda done: on_step("collecting saliency, batches", done, None),
        )
    seconds = monotonic() - start
    save_saliency(saliency, out)
    result = {"out": str(out), "tokens": saliency.provenance["tokens"], "seconds": seconds}
    print_result(result, as_json=as_json, lines=[_line(result)])


def _line(result: dict) -> str:
    return f"wrote {result['out']}: {result['tokens']:,} tokens in {result['seconds']:.1f} s"
