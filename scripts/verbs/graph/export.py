"""``fedgraft export``: an expert graph as a checkpoint that other tools load."""

from __future__ import annotations

from typing import Annotated

import typer

from configs.choices import ExportFormat
from scripts.shared.console import print_result, quiet_libraries
from scripts.shared.options import GraphModel, JsonFlag, NewCheckpoint
from scripts.shared.verb import verb


@verb
def export(
    model: GraphModel,
    write: NewCheckpoint,
    to: Annotated[
        ExportFormat, typer.Option(help="Format: a plain LlamaForCausalLM (dense).")
    ] = ExportFormat.DENSE,
    as_json: JsonFlag = False,
) -> None:
    """Write an expert graph as a plain dense Llama that transformers loads without FedGraft.

    Exact while edge gains and output gains are zero. Otherwise lists what a dense Llama cannot hold, and the logit
    difference.
    """
    from configs.output import check_output_directory, new_directory
    from models.checkpoints.dense_export import export_dense
    from models.checkpoints.load import load_graph, load_tokenizer
    from models.checkpoints.save import save_checkpoint

    quiet_libraries()
    check_output_directory(write.out, overwrite=write.overwrite)
    graph, tokenizer = load_graph(model), load_tokenizer(model)
    exported = export_dense(graph)
    size = sum(value.nbytes for value in exported.model.parameters())
    with new_directory(write.out, overwrite=write.overwrite, size=size) as directory:
        save_checkpoint(exported.model, tokenizer, directory)
    result = {
        "out": str(write.out),
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
