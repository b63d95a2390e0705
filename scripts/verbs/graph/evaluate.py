"""``fedgraft evaluate``: token-weighted perplexity of an expert graph or any causal language model."""

from __future__ import annotations

from typing import Annotated

import typer

from scripts.shared.console import (
    BlockSize,
    DataSources,
    Device,
    JsonFlag,
    MaxBlocks,
    Precision,
    Split,
    print_result,
    progress,
    quiet_libraries,
)


def evaluate(
    model: Annotated[
        str, typer.Option(help="Directory or hub id of a graph or a plain Hugging Face checkpoint.")
    ],
    data: DataSources,
    experts_per_token: Annotated[
        int | None, typer.Option(min=1, help="Experts that a token visits (k), in place of the graph's own.")
    ] = None,
    split: Split = "valid",
    block_size: BlockSize = None,
    max_blocks: MaxBlocks = 0,
    precision: Precision = None,
    device: Device = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Measure token-weighted perplexity on held-out text, per domain and over all of it."""
    from federated.data.blocks import pack_blocks
    from federated.data.text_batches import texts_by_domain
    from models.checkpoints.load import load_causal_lm, load_tokenizer
    from models.files.config_file import read_config
    from models.graph.runtime_settings import set_visits
    from models.runtime.perplexity import LossSum, evaluate_loss
    from models.runtime.precision import choose_device

    quiet_libraries()
    texts = texts_by_domain(data, split)
    lm = load_causal_lm(model, precision=precision, device=choose_device(device))
    tokenizer = load_tokenizer(model)
    if experts_per_token is not None:
        set_visits(lm, experts_per_token)
    losses = {}
    context = read_config(model).max_position_embeddings
    with progress() as on_step:
        for done, (domain, documents) in enumerate(texts.items()):
            on_step("evaluating domains", done, len(texts))
            blocks = pack_blocks(
                documents,
                tokenizer,
                block_size=block_size or min(256, context),
                max_blocks=max_blocks,
                max_position_embeddings=context,
            )
            losses[domain] = evaluate_loss(lm, blocks.input_ids, blocks.labels)
        on_step("evaluating domains", len(texts), len(texts))
    total = sum(losses.values(), LossSum())
    domains = {name: {"perplexity": loss.perplexity, "tokens": loss.tokens} for name, loss in losses.items()}
    result = {"perplexity": total.perplexity, "tokens": total.tokens, "domains": domains}
    print_result(result, as_json=as_json, lines=[_table(result)])


def _table(result: dict):
    from rich.table import Table

    table = Table("domain", "perplexity", "tokens")
    for name, figures in result["domains"].items():
        table.add_row(name, f"{figures['perplexity']:.3f}", str(figures["tokens"]))
    table.add_row("all", f"{result['perplexity']:.3f}", str(result["tokens"]))
    return table
