"""``fedgraft export``: an expert graph as a checkpoint that other tools load."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.choices import ExportedWeights, ExportFormat, GgufModel, Split
from scripts.shared.console import print_result, progress, quiet_libraries
from scripts.shared.options import DATA, EvaluationTokens, ExpertModel, JsonFlag, NewCheckpoint
from scripts.shared.verb import verb

if TYPE_CHECKING:
    from models.export.pipeline import ExportText

# Most tokens of the text from which the router scale is chosen.
_CALIBRATION_TOKENS = 1024
# Documents of each WikiMix domain: more than the text of a report needs.
_DOCUMENTS = 100


@dataclass(frozen=True)
class ExportSettings:
    """Format of an export, and the deviation that is accepted."""

    to: Annotated[
        ExportFormat,
        typer.Option(
            help="Format: LlamaForCausalLM with every expert active (dense), a mixture of experts of transformers, of "
            "which qwen2-moe and granite-moe have a shared expert, or a GGUF file."
        ),
    ] = ExportFormat.DENSE
    weights: Annotated[
        ExportedWeights,
        typer.Option(help="Type of the written weights; auto: as stored, or fp16 in a GGUF file."),
    ] = ExportedWeights.AUTO
    gguf_model: Annotated[
        GgufModel,
        typer.Option(
            help="Model in the GGUF file of an expert graph; auto: qwen2-moe with shared experts, else mixtral."
        ),
    ] = GgufModel.AUTO
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Largest mean KL divergence in nats per token; nothing is written above it."
        ),
    ] = None
    equalise: Annotated[
        bool,
        typer.Option(
            "--equalise",
            "--equalize",
            help="Pad layers with fewer experts than others, in place of refusing them.",
        ),
    ] = False
    exponent: Annotated[
        int | None,
        typer.Option(
            "--router-exponent",
            min=0,
            max=30,
            help="Scale router rows by 2^-N; N is chosen by measurement unless given.",
        ),
    ] = None


@dataclass(frozen=True)
class CardOptions:
    """Facts of the model card."""

    base_model: Annotated[
        str,
        typer.Option(
            help="Name of the dense base in the model card; that of the model's own card unless given."
        ),
    ] = ""
    license: Annotated[
        str, typer.Option(help="Licence in the model card; that of the model's own card unless given.")
    ] = ""
    trained_on: Annotated[
        list[str] | None, typer.Option(help="Name of training data in the model card; repeatable.")
    ] = None


@verb
def export(
    model: ExpertModel,
    write: NewCheckpoint,
    settings: ExportSettings = ExportSettings(),
    card: CardOptions = CardOptions(),
    data: Annotated[list[str], DATA] = ["wikimix"],  # noqa: B006 - a default of the command line
    evaluation_tokens: EvaluationTokens = 4096,
    as_json: JsonFlag = False,
) -> None:
    """Write an expert graph as a plain Llama, a mixture of experts of transformers, or a GGUF file for llama.cpp.

    Names what the format cannot hold, with its layers, and measures divergence, logit difference and perplexity on
    held-out text: of the written weights from the graph; of a dense Llama from the graph with every expert active. A
    mixture of experts that has the format already is checked and copied; any Llama, Mixtral or Qwen2-MoE becomes a GGUF
    file.
    """
    from models.export.card import CardFacts
    from models.export.checkpoint import ExportRequest, check_export, export_checkpoint

    quiet_libraries()
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    facts = CardFacts(card.base_model, card.license, tuple(card.trained_on or ()), tuple(data))
    request = ExportRequest(model, write.out, overwrite=write.overwrite, card=facts, **values)
    check_export(request)
    with progress() as on_step:
        result = export_checkpoint(request, _text(model, data, evaluation_tokens), on_step)
    print_result(result, as_json=as_json, lines=_lines(result))


def _text(model: str, sources: list[str], tokens: int) -> ExportText:
    """Blocks of training documents for choices and of held-out documents for the comparison, in order."""
    from configs.block_size import choose_block_size, context_length
    from federated.data.chat_template import ChatTemplate
    from federated.data.text_batches import even_blocks, texts_by_domain
    from models.checkpoints.load import load_tokenizer
    from models.export.pipeline import ExportText
    from models.files.config_file import read_config

    config, tokenizer = read_config(model), load_tokenizer(model)
    chat, size = ChatTemplate(lambda: tokenizer), choose_block_size(None, context_length(config))

    def blocks(split: Split, wanted: int) -> Any:
        texts = list(texts_by_domain(sources, split, chat=chat, wikimix_documents=_DOCUMENTS).values())
        return even_blocks(
            texts, tokenizer, blocks=-(-wanted // size), block_size=size, vocab_size=config.vocab_size
        )

    held_out = blocks(Split.VALID, tokens)
    calibration = blocks(Split.TRAIN, min(tokens, _CALIBRATION_TOKENS)).input_ids
    return ExportText(calibration, held_out.input_ids, held_out.labels)


def _lines(result: dict) -> list[str]:
    perplexity = result["perplexity"]
    return [
        f"wrote {result['out']} ({'exact' if result['exact'] else 'approximate'})",
        *(f"not representable: {what}" for what in result["not_representable"]),
        f"held-out perplexity {perplexity['before']:.4f} before, {perplexity['after']:.4f} after; "
        f"mean KL divergence {result['mean_kl']:.2e} nats per token",
        f"logit difference: mean {result['mean_logit_difference']:.2e}, largest {result['max_logit_difference']:.2e}; "
        f"same first token {result['argmax_agreement']:.2%} ({result['tokens']} tokens)",
    ]
