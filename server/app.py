"""The Flower ServerApp: open the graph, run the federation, leave logs and a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from transformers import PreTrainedConfig

from configs.errors import UserError
from configs.output import check_output_directory
from configs.paths import cache_folder, graph_or_default
from configs.schema import RunConfig, load_run_config
from federated.data.blocks import Blocks, pack_blocks
from federated.data.documents import load_documents
from federated.run_setup import override_routing, prepare_process
from models.bootstrap.calibration import sample_text
from models.files.config_file import check_is_graph, read_config
from server.model.global_model import GlobalModel
from server.reporting.call_trace import call_trace
from server.rounds.loop import Federation
from server.rounds.run_observer import RunObserver

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation as its run configuration says.

    Raises:
        UserError: bad input of any kind, before anything is written.
    """
    config = load_run_config(context.run_config)
    run_federation(grid, config, run_id=context.run_id)


def run_federation(grid: Grid, config: RunConfig, *, run_id: int) -> dict:
    """Run a federation over ``grid`` and return its summary (see ``server.rounds.run_observer``)."""
    prepare_process(config)
    if config.out:
        check_output_directory(Path(config.out), overwrite=config.overwrite)
    server = open_global_model(config)
    validation = server_text(config, server)
    log_dir = Path(config.log_dir) if config.log_dir else cache_folder() / "runs" / str(run_id)
    observer = RunObserver(log_dir, server=server)
    Federation(grid=grid, config=config, server=server, observer=observer, validation=validation).run()
    text = validation.input_ids if validation is not None else _sampled(server, config)
    observer.trace(call_trace(server.model, text, config.trace_tokens))
    if config.out:
        server.save(Path(config.out), overwrite=config.overwrite)
    return observer.close(out=config.out)


def open_global_model(config: RunConfig) -> GlobalModel:
    """The graph that the configuration names, or the one that the quick start left.

    Raises:
        UserError: there is none, or the configuration does not fit it.
    """
    source = graph_source(config)
    check_fit(config, read_config(source))
    server = GlobalModel(source)
    override_routing(server.model, config)
    return server


def graph_source(config: RunConfig) -> str:
    """The checkpoint that the configuration names, or the one that the quick start left.

    Raises:
        UserError: there is none.
    """
    return graph_or_default(config.graph)


def check_fit(config: RunConfig, graph: PreTrainedConfig) -> None:
    """Refuse a run configuration that the graph cannot serve, from the graph's ``config.json`` alone.

    Raises:
        UserError: not a graph, budgets or experts per token above its experts, blocks beyond its context.
    """
    check_is_graph(graph, graph_source(config))
    experts, context = max(graph.num_experts), graph.max_position_embeddings
    for key, value, most, what in (
        ("budgets", max(config.client_budgets), experts, "experts per layer"),
        ("experts-per-token", config.experts_per_token, experts, "experts per layer"),
        ("block-size", config.block_size, context, "tokens of context"),
    ):
        if value > most:
            raise UserError(f"expected {key} to be at most the graph's {most} {what}, got {value}")


def server_text(config: RunConfig, server: GlobalModel) -> Blocks | None:
    """The server's own validation text as blocks; None if the configuration names none."""
    if not config.server_sources:
        return None
    documents = load_documents(
        config.server_sources,
        template=config.template,
        wikimix_documents=config.train_documents,
        seed=config.seed + 1,
    ).shuffle(seed=config.seed)
    texts = (row["text"] for row in documents if row["split"] == "valid")
    return pack_blocks(texts, server.tokenizer, block_size=config.block_size, max_blocks=config.eval_blocks)


def _sampled(server: GlobalModel, config: RunConfig) -> torch.Tensor:
    """Text for the call trace where the server has none: sampled from the model."""
    length = max(2, min(config.block_size, config.trace_tokens))
    return sample_text(server.model, blocks=1, block_size=length, seed=config.seed)
