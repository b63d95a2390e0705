"""``fedgraft bootstrap``: a dense Llama as a graph of experts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

import typer

from configs.choices import Clustering, Features, Report, RouterFit
from scripts.shared.console import print_result, progress, quiet_libraries, stderr
from scripts.shared.options import DenseModel, EvaluationTokens, JsonFlag, NewCheckpoint
from scripts.shared.verb import verb

if TYPE_CHECKING:
    from models.bootstrap.build import BootstrapOptions


@dataclass(frozen=True)
class ExpertOptions:
    """Construction of the experts and their routers."""

    features: Annotated[
        Features | None,
        typer.Option(
            help="Features of a neuron for k-means: rows of its weights, its activations, or those of its gate; unless "
            "given, activations of the gate with the router contribution, else rows of the gate."
        ),
    ] = None
    clustering: Annotated[
        Clustering,
        typer.Option(
            help="Balanced k-means: minimum-cost flow, or the package k-means-constrained (an extra)."
        ),
    ] = Clustering.FLOW
    router: Annotated[
        RouterFit,
        typer.Option(
            help="Router: ridge regression to the experts' contributions, layer by layer on the outputs of the layers "
            "before, ridge regression to ranks of the experts, or the mean gate row of each expert."
        ),
    ] = RouterFit.CONTRIBUTION
    num_shared: Annotated[
        int | None,
        typer.Option(
            "--shared-experts",
            help="Shared experts per layer: the neurons of largest contribution, visited by every token. Unless given, "
            "30 % of the experts per token with the router contribution, else 0.",
        ),
    ] = None
    default_rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of the affine map that stands in for the experts that a token does not visit; 0: none. Unless "
            "given, two ninths of the hidden width with the router contribution, else 0."
        ),
    ] = None
    experts_per_token: Annotated[
        int | None, typer.Option(help="Experts visited per token (k); half of them unless given.")
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the sampled text and of k-means.")] = 0
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Layers clustered in parallel; chosen by the size of the layers unless given."
        ),
    ] = None

    def bootstrap_options(self, experts: int, hidden_size: int) -> BootstrapOptions:
        """The options in the terms of the library, for a model of this hidden width."""
        from models.bootstrap.build import BootstrapOptions

        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return BootstrapOptions.of_router(experts, hidden_size, **given)


@dataclass(frozen=True)
class CalibrationOptions:
    """Text on which routers are fitted and the report is measured."""

    calibration: Annotated[
        list[str] | None,
        typer.Option(help="Calibration text, sources as for --data; sampled from the model unless given."),
    ] = None
    calibration_tokens: Annotated[int, typer.Option(min=256, help="Tokens of calibration text.")] = 8192
    evaluation_tokens: EvaluationTokens = 4096
    report: Annotated[
        Report,
        typer.Option(
            help="Held-out perplexity: none, router and static selection, or all baselines of the selection."
        ),
    ] = Report.FULL


@verb
def bootstrap(
    model: DenseModel,
    experts: Annotated[int, typer.Option(help="Experts per layer; must divide the FFN width.")],
    write: NewCheckpoint,
    build: ExpertOptions = ExpertOptions(),
    text: CalibrationOptions = CalibrationOptions(),
    as_json: JsonFlag = False,
) -> None:
    """Split the FFNs of a dense Llama into experts by balanced k-means, without training.

    The most contributing neurons form shared experts; routers, and default outputs of the experts that a token does not
    visit, are fitted layer by layer. With every expert active the new model computes what the dense one computes. The
    report shows the held-out perplexity with 75, 50 and 25 % of the experts active, next to other selections of equally
    many neurons.
    """
    from models.bootstrap.pipeline import bootstrap_checkpoint
    from models.checkpoints.convert import as_checkpoint
    from models.files.config_file import read_config

    quiet_libraries()
    model = as_checkpoint(model)
    options = build.bootstrap_options(experts, getattr(read_config(model), "hidden_size", 0))
    tokens = text.calibration_tokens + text.evaluation_tokens
    with progress() as on_step:
        result = bootstrap_checkpoint(
            source=model,
            out=write.out,
            options=options,
            calibration_ids=_token_blocks(model, text.calibration, tokens) if text.calibration else None,
            calibration_tokens=text.calibration_tokens,
            evaluation_tokens=text.evaluation_tokens,
            report=text.report,
            overwrite=write.overwrite,
            on_step=on_step,
        )
    difference = (
        f"relative logit difference to the dense model, all experts active: {result['logit_difference']:.1e}"
    )
    table = [report_table(result["perplexity"])] if result["perplexity"] else []
    lines = [*table, difference, f"wrote {result['out']}"]
    print_result(result, as_json=as_json, lines=lines)
    if not as_json:
        stderr.print(
            f"next: fedgraft simulate --graph {result['out']} --clients 2 --rounds 3 --out DIR --log-dir DIR"
        )


def _token_blocks(model: str, sources: list[str], tokens: int):
    """Token blocks ``[N, S]`` of the training documents of ``sources``."""
    from configs.block_size import choose_block_size, context_length
    from federated.data.blocks import pack_blocks
    from federated.data.chat_template import ChatTemplate
    from federated.data.documents import absolute_sources, load_documents
    from models.checkpoints.load import load_tokenizer
    from models.files.config_file import read_config

    block_size = choose_block_size(None, context_length(read_config(model)))
    tokenizer = load_tokenizer(model)
    rows = load_documents(absolute_sources(sources), chat=ChatTemplate(lambda: tokenizer)).shuffle(seed=0)
    texts = (row["text"] for row in rows if row["split"] == "train")
    blocks = pack_blocks(texts, tokenizer, block_size=block_size, max_blocks=-(-tokens // block_size))
    return blocks.input_ids


def report_table(perplexity: dict):
    """A rich table of the report: a row per active share, a column per selection of experts."""
    from rich.table import Table

    columns = tuple(perplexity["50"])
    table = Table(title=f"held-out perplexity before training (dense: {perplexity['dense']:.2f})")
    table.add_column("active experts")
    for name in columns:
        table.add_column(name, justify="right")
    for share in ("75", "50", "25"):
        table.add_row(f"{share} %", *(f"{perplexity[share][name]:.2f}" for name in columns))
    return table
