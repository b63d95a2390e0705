"""``fedgraft bootstrap``: a dense Llama becomes a graph of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scripts.shared.console import JsonFlag, Overwrite, print_result, progress, quiet_libraries, stderr


def bootstrap(
    model: Annotated[str, typer.Option(help="Directory or hub id of a dense Llama.")],
    experts: Annotated[int, typer.Option(help="Experts per layer; must divide the FFN width.")],
    out: Annotated[Path, typer.Option("--out", "--output", help="Directory of the new checkpoint.")],
    features: Annotated[str, typer.Option(help="gate, up, down, gate+up, joint or activation.")] = "gate",
    clustering: Annotated[
        str, typer.Option(help="flow, or k-means-constrained: the package that EMoE uses (an extra).")
    ] = "flow",
    router: Annotated[str, typer.Option(help="ridge or centroid.")] = "ridge",
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Calibration text, sources as for --data; sampled from the model where none is given."
        ),
    ] = None,
    experts_per_token: Annotated[
        int | None, typer.Option(help="Experts that a token visits (k); half of them where not given.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=256, help="Tokens of calibration text.")] = 8192,
    evaluation_tokens: Annotated[int, typer.Option(min=256, help="Held-out tokens of the report.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of sampling and clustering.")] = 0,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Layers clustered side by side; as it pays where not given.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Split the FFNs of a dense Llama into experts by balanced k-means, without any training.

    With every expert active the new model computes what the dense one computes. The report shows the perplexity
    when 75, 50 and 25 % of the experts are active, beside other ways to choose as many neurons.
    """
    from models.bootstrap.build import BootstrapOptions
    from models.bootstrap.pipeline import bootstrap_checkpoint

    quiet_libraries()
    options = BootstrapOptions(
        num_experts=experts,
        features=features,
        clustering=clustering,
        router=router,
        experts_per_token=experts_per_token,
        seed=seed,
        jobs=jobs,
    )
    tokens = calibration_tokens + evaluation_tokens
    with progress() as on_step:
        result = bootstrap_checkpoint(
            source=model,
            out=out,
            options=options,
            calibration_ids=_token_blocks(model, calibration, tokens) if calibration else None,
            calibration_tokens=calibration_tokens,
            evaluation_tokens=evaluation_tokens,
            overwrite=overwrite,
            on_step=on_step,
        )
    print_result(
        result, as_json=as_json, lines=[report_table(result["perplexity"]), f"wrote {result['out']}"]
    )
    if not as_json:
        stderr.print(
            f"next: fedgraft simulate --graph {result['out']} --clients 2 --rounds 3 --out DIR --log-dir DIR"
        )


def _token_blocks(model: str, sources: list[str], tokens: int):
    """Training text of ``sources`` as blocks ``[N, S]`` of the model's own tokens."""
    from federated.data.blocks import pack_blocks
    from federated.data.documents import absolute_sources, load_documents
    from models.checkpoints.load import load_tokenizer
    from models.files.config_file import read_config

    block_size = min(256, read_config(model).max_position_embeddings)
    rows = load_documents(absolute_sources(sources)).shuffle(seed=0)
    texts = (row["text"] for row in rows if row["split"] == "train")
    blocks = pack_blocks(
        texts, load_tokenizer(model), block_size=block_size, max_blocks=-(-tokens // block_size)
    )
    return blocks.input_ids


def report_table(perplexity: dict):
    """A rich table of the report: a row per active share, a column per way to choose experts."""
    from rich.table import Table

    columns = ("router", "centroid", "static", "oracle", "random")
    table = Table(title=f"held-out perplexity before training (dense: {perplexity['dense']:.2f})")
    table.add_column("active experts")
    for name in columns:
        table.add_column(name, justify="right")
    for share in ("75", "50", "25"):
        table.add_row(f"{share} %", *(f"{perplexity[share][name]:.2f}" for name in columns))
    return table
