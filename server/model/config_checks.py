"""Checks of a run configuration against its graph, before the graph's weights are read."""

from __future__ import annotations

from pathlib import Path

from configs.errors import UserError
from configs.output import check_free_space
from configs.schema import RunConfig
from models.files.config_file import check_is_graph, read_config
from models.files.safetensors_files import weight_bytes
from models.graph.runtime_settings import fewest_residents


def check_fit(config: RunConfig, graph: str) -> None:
    """Check a run configuration against the ``config.json`` of ``graph``, a checkpoint folder.

    Raises:
        UserError: the model is not an expert graph, budgets or experts per token exceed its experts per layer or leave
            no room for its shared ones, or block-size exceeds its context length.
    """
    found = read_config(graph)
    check_is_graph(found, graph)
    experts, context = max(found.num_experts), found.max_position_embeddings
    for key, value, most, what in (
        ("budgets", max(config.client_budgets), experts, "experts per layer"),
        ("experts-per-token", config.experts_per_token, experts, "experts per layer"),
        ("block-size", config.block_size, context, "tokens of context"),
    ):
        if value > most:
            raise UserError(f"expected {key} to be at most the graph's {most} {what}, got {value}")
    least = fewest_residents(found)
    for key, counts in (
        ("budgets", config.client_budgets),
        ("experts-per-token", [config.experts_per_token]),
    ):
        if any(0 < count < least for count in counts):
            raise UserError(
                f"expected {key} to be at least the graph's {least} shared experts per layer, which every token "
                f"visits, got {min(filter(None, counts))}"
            )


def check_room(config: RunConfig, graph: str) -> None:
    """Check that there is room for the trained model in ``out``, and for checkpoints and the best model in the logs.

    Each takes as many bytes as the weights of ``graph``, a checkpoint folder.

    Raises:
        UserError: a file system has less.
    """
    size, every, keep = weight_bytes(graph), config.checkpoint_every, config.keep_checkpoints
    checkpoints = config.num_rounds // every if every else 0
    # The oldest one is removed after the latest is written.
    checkpoints = min(checkpoints, keep + 1) if keep else checkpoints
    models = checkpoints + bool(config.out and config.keep_best)
    sizes = {Path(config.log_dir): size * models} if config.log_dir else {}
    if config.out:
        sizes[Path(config.out)] = size
    check_free_space(sizes)
