"""``fedgraft evaluate``: token-weighted perplexity of an expert graph or any causal language model."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.choices import LossOn, Split
from scripts.shared.console import print_result, progress, quiet_libraries
from scripts.shared.options import (
    LOSS_ON,
    BlockOptions,
    CausalModel,
    DataSources,
    JsonFlag,
    RuntimeOptions,
    SplitOption,
)
from scripts.shared.verb import verb

if TYPE_CHECKING:
    from federated.data.answers import Document
    from models.runtime.perplexity import LossSum


@verb
def evaluate(
    model: CausalModel,
    data: DataSources,
    experts_per_token: Annotated[
        int | None, typer.Option(min=1, help="Experts visited per token (k), in place of the graph's own.")
    ] = None,
    split: SplitOption = Split.VALID,
    loss_on: Annotated[LossOn, LOSS_ON] = LossOn.ALL,
    blocks: BlockOptions = BlockOptions(),
    runtime: RuntimeOptions = RuntimeOptions(),
    as_json: JsonFlag = False,
) -> None:
    """Measure token-weighted perplexity on held-out text, per domain and over all of it."""
    from federated.data.chat_template import ChatTemplate
    from federated.data.text_batches import texts_by_domain
    from models.checkpoints.convert import as_checkpoint
    from models.checkpoints.load import load_causal_lm, load_tokenizer
    from models.graph.runtime_settings import set_visits
    from models.runtime.perplexity import LossSum
    from models.runtime.precision import choose_device, precision_name

    quiet_libraries()
    model = as_checkpoint(model)
    chat = ChatTemplate(partial(load_tokenizer, model))
    texts = texts_by_domain(data, split, chat=chat, loss_on=loss_on)
    lm = load_causal_lm(model, precision=runtime.precision, device=choose_device(runtime.device))
    if experts_per_token is not None:
        set_visits(lm, experts_per_token)
    losses = _losses(model, lm, texts, blocks)
    total = sum(losses.values(), LossSum())
    domains = {name: {"perplexity": loss.perplexity, "tokens": loss.tokens} for name, loss in losses.items()}
    result = {
        "perplexity": total.perplexity,
        "tokens": total.tokens,
        "domains": domains,
        "loss_on": str(loss_on),
        "precision": precision_name(lm),
    }
    print_result(result, as_json=as_json, lines=[_table(result)])


def _losses(model: str, lm: Any, texts: dict[str, list[Document]], sizes: BlockOptions) -> dict[str, LossSum]:
    """Loss of the opened model ``lm`` on the documents of each domain."""
    from configs.block_size import choose_block_size, context_length
    from federated.data.blocks import pack_blocks
    from models.checkpoints.load import load_tokenizer
    from models.files.config_file import read_config
    from models.runtime.perplexity import evaluate_loss
    from models.runtime.precision import precision_name
    from models.runtime.token_ids import embedding_rows

    tokenizer, context = load_tokenizer(model), context_length(read_config(model))
    losses = {}
    with progress(precision_name(lm)) as on_step:
        for done, (domain, documents) in enumerate(texts.items()):
            blocks = pack_blocks(
                documents,
                tokenizer,
                block_size=choose_block_size(sizes.block_size, context),
                max_blocks=sizes.max_blocks,
                vocab_size=embedding_rows(lm),
            )
            on_step("evaluating domains", done, len(texts))
            losses[domain] = evaluate_loss(lm, blocks.input_ids, blocks.labels)
        on_step("evaluating domains", len(texts), len(texts))
    return losses


def _table(result: dict):
    from rich.table import Table

    table = Table("domain", "perplexity", "tokens")
    for name, figures in result["domains"].items():
        table.add_row(name, f"{figures['perplexity']:.3f}", str(figures["tokens"]))
    table.add_row("all", f"{result['perplexity']:.3f}", str(result["tokens"]))
    return table
