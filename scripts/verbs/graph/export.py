"""``fedgraft export``: an expert graph as a checkpoint that other tools load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.choices import ExportedWeights, ExportFormat, Split
from scripts.shared.console import print_result, progress, quiet_libraries
from scripts.shared.options import DATA, EvaluationTokens, ExpertModel, JsonFlag, NewCheckpoint
from scripts.shared.verb import verb

if TYPE_CHECKING:
    import torch

    from models.export.pipeline import ExportOptions, ExportText

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
            help="Format: LlamaForCausalLM with every expert active (dense), or a mixture of experts of transformers, "
            "of which qwen2-moe and granite-moe have a shared expert."
        ),
    ] = ExportFormat.DENSE
    weights: Annotated[
        ExportedWeights, typer.Option(help="Type of the written weights; auto: as stored.")
    ] = ExportedWeights.AUTO
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
    router_exponent: Annotated[
        int | None,
        typer.Option(
            min=0, max=30, help="Scale router rows by 2^-N; N is chosen by measurement unless given."
        ),
    ] = None


@verb
def export(
    model: ExpertModel,
    write: NewCheckpoint,
    settings: ExportSettings = ExportSettings(),
    data: Annotated[list[str], DATA] = ["wikimix"],  # noqa: B006 - a default of the command line
    evaluation_tokens: EvaluationTokens = 4096,
    as_json: JsonFlag = False,
) -> None:
    """Write an expert graph as a plain Llama or mixture of experts that transformers loads without FedGraft.

    Names what the format cannot hold, with its layers, and measures divergence, logit difference and perplexity on
    held-out text: of the format's model from the graph; of a dense Llama from the graph with every expert active. A
    mixture of experts that has the format already is checked and copied.
    """
    from configs.output import check_output_directory
    from models.files.config_file import read_config
    from models.remote_code.configuration_fedgraft import FedGraftConfig

    quiet_libraries()
    check_output_directory(write.out, overwrite=write.overwrite)
    config = read_config(model)
    measured = _export_graph if config.model_type == FedGraftConfig.model_type else _copy
    result = {"out": str(write.out), "to": settings.to}
    result |= measured(model, write, settings, data, evaluation_tokens)
    print_result(result, as_json=as_json, lines=_lines(result))


def _export_graph(
    model: str, write: NewCheckpoint, settings: ExportSettings, data: list[str], tokens: int
) -> dict[str, Any]:
    from configs.output import check_free_space, new_directory
    from models.checkpoints.load import load_graph, load_tokenizer
    from models.checkpoints.save import cast_weights, save_checkpoint
    from models.export.pipeline import check_divergence, export_graph
    from models.runtime.precision import precision_name

    options, text = _options(model, settings), _text(model, data, tokens)
    graph = load_graph(model, precision="fp32")
    check_free_space({write.out: sum(p.numel() * options.dtype.itemsize for p in graph.parameters())})
    with progress() as on_step:
        exported = export_graph(graph, text, options, on_step)
    check_divergence(exported.deviation, settings.max_kl)
    del graph
    size = sum(parameter.numel() * options.dtype.itemsize for parameter in exported.model.parameters())
    with new_directory(write.out, overwrite=write.overwrite, size=size) as directory:
        save_checkpoint(cast_weights(exported.model, options.dtype), load_tokenizer(model), directory)
    return {**exported.figures(), "weights": precision_name(exported.model)}


def _copy(
    model: str, write: NewCheckpoint, settings: ExportSettings, data: list[str], tokens: int
) -> dict[str, Any]:
    """Copy a mixture of experts that has the format, and measure it."""
    from configs.output import new_directory
    from models.checkpoints.load import load_causal_lm
    from models.export.deviation import Deviation
    from models.export.own_format import check_own_format, copy_checkpoint
    from models.files.config_file import read_config
    from models.files.safetensors_files import weight_bytes
    from models.files.side_files import local_checkpoint
    from models.runtime.perplexity import evaluate_loss
    from models.runtime.precision import precision_name

    check_own_format(read_config(model), settings.to, model)
    source, text = local_checkpoint(model), _text(model, data, tokens)
    lm = load_causal_lm(str(source), precision="auto")
    loss = evaluate_loss(lm, text.input_ids, text.labels)
    with new_directory(write.out, overwrite=write.overwrite, size=weight_bytes(str(source))) as directory:
        copy_checkpoint(source, directory)
    figures = Deviation(before=loss, after=loss, agreed=loss.tokens).figures()
    return {"exact": True, **figures, "not_representable": [], "weights": precision_name(lm)}


def _options(model: str, settings: ExportSettings) -> ExportOptions:
    from models.export.pipeline import ExportOptions

    return ExportOptions(
        to=settings.to,
        dtype=_dtype(model, settings.weights),
        equalise=settings.equalise,
        exponent=settings.router_exponent,
    )


def _dtype(model: str, weights: ExportedWeights) -> torch.dtype:
    import torch

    from models.files.config_file import read_dtype

    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return named.get(weights) or read_dtype(model)


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
