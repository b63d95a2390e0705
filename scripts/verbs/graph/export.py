"""``fedgraft export``: an expert graph leaves as a checkpoint that other tools load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scripts.shared.console import JsonFlag, Overwrite, print_result, quiet_libraries


def export(
    model: Annotated[str, typer.Option(help="Directory of an expert graph.")],
    out: Annotated[Path, typer.Option("--out", "--output", help="Directory of the new checkpoint.")],
    to: Annotated[str, typer.Option(help="dense: a plain LlamaForCausalLM.")] = "dense",
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Write an expert graph as a plain dense Llama that transformers loads without FedGraft.

    Exact while edge gains and output gains are zero; otherwise says what a dense Llama cannot hold, and measures it.
    """
    from configs.errors import UserError
    from configs.output import check_output_directory, new_directory
    from models.checkpoints.dense_export import export_dense
    from models.checkpoints.load import load_graph, load_tokenizer

    quiet_libraries()
    if to != "dense":
        raise UserError(f"expected --to dense, got {to!r}")
    check_output_directory(out, overwrite=overwrite)
    graph, tokenizer = load_graph(model), load_tokenizer(model)
    exported = export_dense(graph)
    with new_directory(out, overwrite=overwrite) as directory:
        exported.model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    result = {
        "out": str(out),
        "to": to,
        "exact": exported.exact,
        "max_logit_difference": exported.max_logit_difference,
        "not_representable": exported.not_representable,
    }
    print_result(result, as_json=as_json, lines=_lines(result))


def _lines(result: dict) -> list[str]:
    difference = f"largest logit difference with every expert active: {result['max_logit_difference']:.2e}"
    lost = [f"not representable: {what}" for what in result["not_representable"]]
    return [f"wrote {result['out']} ({'exact' if result['exact'] else 'approximate'})", *lost, difference]
