"""``fedgraft heal``: short training of an expert graph by distillation from its dense base."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.choices import Device, HealedParts, HealingLoss, Precision, Split
from scripts.shared.console import print_result, progress, quiet_libraries
from scripts.shared.options import (
    BatchOptions,
    DataSources,
    DeviceOption,
    EvaluationTokens,
    GraphModel,
    JsonFlag,
    NewCheckpoint,
)
from scripts.shared.verb import verb

if TYPE_CHECKING:
    from models.healing.options import HealingOptions
    from models.healing.pipeline import HealingText

DEFAULT_STEPS = 64


@dataclass(frozen=True)
class TrainingOptions:
    """Extent and method of the training."""

    steps: Annotated[
        int | None, typer.Option(min=1, help=f"Optimizer steps; {DEFAULT_STEPS} unless minutes are given.")
    ] = None
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Wall time of the training in minutes, in place of a number of steps; evaluation not included."
        ),
    ] = None
    train: Annotated[
        HealedParts,
        typer.Option(
            help="Trained parameters: default outputs, norms and routers (defaults), and LoRA factors of attention "
            "(lora), the experts' matrices (experts), or experts and attention (all)."
        ),
    ] = HealedParts.EXPERTS
    rank: Annotated[int, typer.Option(help="Rank of the LoRA factors.")] = 16
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of Adam.")] = 1e-4
    loss: Annotated[
        HealingLoss,
        typer.Option(help="Loss: divergence of logits (kl), relative distance of hidden states, or both."),
    ] = HealingLoss.KL
    temperature: Annotated[float, typer.Option(help="Temperature of the divergence of logits.")] = 1.0
    precision: Annotated[
        Precision, typer.Option(help="Precision of matrix products; weights train in fp32.")
    ] = Precision.AUTO
    seed: Annotated[int, typer.Option(help="Seed of the order of blocks and of the LoRA factors.")] = 0


@verb
def heal(
    model: GraphModel,
    base: Annotated[str, typer.Option(help="Directory or hub id of the dense base of the graph.")],
    data: DataSources,
    write: NewCheckpoint,
    training: TrainingOptions = TrainingOptions(),
    blocks: BatchOptions = BatchOptions(batch_size=4, max_blocks=1024),
    evaluation_tokens: EvaluationTokens = 4096,
    device: DeviceOption = Device.AUTO,
    as_json: JsonFlag = False,
) -> None:
    """Train an expert graph by distillation from its dense base, and report the held-out perplexity.

    Training documents train, held-out documents measure. Afterwards the graph with all experts active does not equal
    the dense model, and cannot be rebuilt from it: clients need the new folder. The command continues an interrupted
    run.
    """
    from configs.output import check_output_directory
    from models.checkpoints.convert import as_checkpoint
    from models.healing.pipeline import check_pair, heal_checkpoint
    from models.runtime.precision import choose_device

    quiet_libraries()
    check_output_directory(write.out, overwrite=write.overwrite)
    base = as_checkpoint(base)
    check_pair(model, base)
    options = _options(training, blocks)
    with progress() as on_step:
        result = heal_checkpoint(
            graph=model,
            base=base,
            out=write.out,
            text=_text(model, data, blocks, options, evaluation_tokens),
            options=options,
            device=choose_device(device),
            overwrite=write.overwrite,
            on_step=on_step,
        )
    print_result(result, as_json=as_json, lines=_lines(result))


def _options(training: TrainingOptions, blocks: BatchOptions) -> HealingOptions:
    from models.healing.options import HealingOptions

    values = {field.name: getattr(training, field.name) for field in fields(training)}
    if training.steps is None and training.minutes is None:
        values["steps"] = DEFAULT_STEPS
    given = {name: value for name, value in values.items() if value is not None}
    return HealingOptions(**given, batch_size=blocks.batch_size)


def _text(
    model: str, sources: list[str], sizes: BatchOptions, options: HealingOptions, evaluation_tokens: int
) -> HealingText:
    """Blocks of each domain, about as many from each: shuffled training documents, held-out documents in order."""
    from configs.block_size import choose_block_size, context_length
    from federated.data.chat_template import ChatTemplate
    from federated.data.text_batches import even_blocks, texts_by_domain
    from models.checkpoints.load import load_tokenizer
    from models.files.config_file import read_config
    from models.healing.pipeline import HealingText

    config, tokenizer = read_config(model), load_tokenizer(model)
    chat = ChatTemplate(lambda: tokenizer)
    train, held_out = (texts_by_domain(sources, split, chat=chat) for split in (Split.TRAIN, Split.VALID))
    shuffled = [random.Random(options.seed).sample(texts, len(texts)) for texts in train.values()]
    size = choose_block_size(sizes.block_size, context_length(config))
    shape: dict[str, Any] = {"block_size": size, "vocab_size": config.vocab_size}
    wanted = options.steps * options.batch_size
    blocks = even_blocks(shuffled, tokenizer, blocks=wanted, max_blocks=sizes.max_blocks, **shape)
    wanted = -(-evaluation_tokens // size)
    measured = even_blocks(list(held_out.values()), tokenizer, blocks=wanted, **shape)
    return HealingText(blocks.input_ids, blocks.labels, measured.input_ids, measured.labels)


def _lines(result: dict) -> list[Any]:
    from rich.table import Table

    table = Table("held-out perplexity", "dense", "before", "after")
    perplexity, difference = result["perplexity"], result["logit_difference"]
    table.add_row("", *(f"{perplexity[name]:.3f}" for name in ("dense", "before", "after")))
    return [
        table,
        f"{result['steps']} steps, {result['tokens']:,} tokens, {result['seconds']:.0f} s, "
        f"{result['core_seconds']:.0f} core-seconds",
        "relative logit difference to the dense model, all experts active: "
        f"{difference['before']:.1e} before, {difference['after']:.1e} after",
        f"wrote {result['out']}",
        "without a recipe: clients that hold the dense base need this folder",
    ]
