"""Bootstrap of an expert graph from a dense checkpoint: load, calibrate, cluster, report, write."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.block_size import choose_block_size, context_length
from configs.choices import Features, Report
from configs.errors import UserError
from configs.output import check_free_space, check_output_directory, new_directory, write_bytes
from experts.clustering import check_expert_count
from models.bootstrap.build import BootstrapOptions, LayerExperts, build_graph, plan_experts
from models.bootstrap.calibration import PROFILE_TOKENS, Calibration, sample_text
from models.bootstrap.cluster_table import cluster_table
from models.bootstrap.equality_check import check_equality, first_logits
from models.bootstrap.recipe import RECIPE_NAME, recipe_of, write_recipe
from models.bootstrap.selection_report import (
    BASELINES,
    SHARES,
    add_router_perplexities,
    baseline_perplexities,
)
from models.checkpoints.load import load_dense, load_tokenizer
from models.checkpoints.save import cast_weights, save_checkpoint
from models.files.config_file import read_config
from models.files.fingerprint import fingerprint
from models.files.safetensors_files import weight_bytes
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.runtime.memory import return_freed_memory
from models.runtime.token_ids import check_token_ids

Step = Callable[[str, int, int], None]

# Most parameters of a model that is calibrated in fp32; larger ones are calibrated in the dtype of their checkpoint.
_FP32_PARAMETERS = 2_000_000_000
_BASELINES = {Report.NONE: (), Report.SHORT: ("static",), Report.FULL: BASELINES}


def bootstrap_checkpoint(
    *,
    source: str,
    out: Path,
    options: BootstrapOptions,
    calibration_ids: Tensor | None,
    calibration_tokens: int,
    evaluation_tokens: int,
    report: str = Report.FULL,
    overwrite: bool = False,
    on_step: Step = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Turn the dense Llama at ``source`` into an expert graph at ``out``, with its recipe.

    Args:
        source: directory or hub id.
        out: new directory, written last.
        options: options of the bootstrap.
        calibration_ids: text ``[N, S]``; None to sample it from the model.
        calibration_tokens: tokens for statistics and routers.
        evaluation_tokens: further tokens, for the report.
        report: extent of the report, see ``configs.choices.Report``; "perplexity" is empty for ``none``.
        overwrite: replace ``out`` if it is not empty.
        on_step: called with the name of a stage, the steps done and their total.

    Returns:
        ``{"out", "experts", "experts_per_token", "clustering", "layers": [{"sizes", "inertia", "seconds"}],
        "perplexity", "logit_difference"}``; the last as ``check_equality`` returns it.

    Raises:
        UserError: an unusable checkpoint, an E that does not divide the FFN width, little text or room, unequal logits.
    """
    check_output_directory(out, overwrite=overwrite)
    width = getattr(read_config(source), "intermediate_size", 0)
    check_expert_count(width or options.num_experts, options.num_experts)
    dense, tokenizer = load_dense(source), load_tokenizer(source)
    check_free_space({out: graph_bytes(source, options)})
    dtype, base = dense.dtype, fingerprint(dense)
    dense = dense.float() if dense.num_parameters() <= _FP32_PARAMETERS else dense
    sizes = calibration_tokens, evaluation_tokens
    calibration, held_out = _texts(dense, tokenizer, calibration_ids, sizes, options.seed, on_step)
    measured = _calibration(dense, calibration, options)
    experts = _experts(measured, options, on_step)
    build = partial(build_graph, dense, experts, options.visits, base_fingerprint=base, consume=True)
    graph, measures = _measured_graph(measured, build, experts, held_out, Report(report), on_step)
    with new_directory(out, overwrite=overwrite) as directory:
        _write(cast_weights(graph, dtype), tokenizer, experts, directory)
    return _summary(out, options, experts) | measures


def graph_bytes(source: str, options: BootstrapOptions) -> int:
    """Bytes of the weights and the recipe of the graph of a dense checkpoint, at most.

    Args:
        source: directory or hub id of the dense checkpoint.
        options: options of the bootstrap.
    """
    config = read_config(source)
    hidden, experts, rank = config.hidden_size, options.num_experts, options.default_rank
    routing = experts * (hidden + 2 * experts + 1)  # router, edge gains and affinities, output gains
    default = hidden * (2 * rank + 1) if rank else 0
    # In fp32, and once more in the recipe, which also has the order of the neurons in 16 bits.
    added = 8 * (routing + default) + 2 * config.intermediate_size
    return weight_bytes(source) + config.num_hidden_layers * added


def _texts(
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor | None,
    sizes: tuple[int, int],
    seed: int,
    on_step: Step,
) -> tuple[Tensor, Tensor]:
    """Calibration and held-out blocks of ``sizes`` tokens, sampled from the model if ``ids`` is None."""
    on_step("calibration text", 0, 1)
    if ids is None:
        ids = sample_calibration(dense, sum(sizes), seed)
    check_token_ids(ids, dense.config.vocab_size, tokenizer)
    parts = split_tokens(ids, *sizes)
    return_freed_memory()
    on_step("calibration text", 1, 1)
    return parts


def _calibration(dense: PreTrainedModel, input_ids: Tensor, options: BootstrapOptions) -> Calibration:
    """Statistics on calibration text, with activation profiles where these are the features of k-means."""
    return Calibration(dense, input_ids, PROFILE_TOKENS if options.features == Features.ACTIVATION else 0)


def _experts(measured: Calibration, options: BootstrapOptions, on_step: Step) -> list[LayerExperts]:
    total = measured.model.config.num_hidden_layers
    return plan_experts(
        measured.model,
        measured.input_ids,
        options,
        measured=measured,
        on_layer=lambda layer: on_step("clustering layers", layer + 1, total),
    )


def _write(
    graph: FedGraftForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    experts: Sequence[LayerExperts],
    directory: Path,
) -> None:
    save_checkpoint(graph, tokenizer, directory)
    write_bytes(directory / RECIPE_NAME, write_recipe(recipe_of(graph)))
    (directory / "cluster_stats.txt").write_text(cluster_table([layer.clusters for layer in experts]))


def _summary(out: Path, options: BootstrapOptions, experts: Sequence[LayerExperts]) -> dict[str, Any]:
    layers = [
        {"sizes": layer.clusters.sizes, "inertia": layer.clusters.inertia, "seconds": layer.seconds}
        for layer in experts
    ]
    return {
        "out": str(out),
        "experts": options.num_experts,
        "experts_per_token": options.visits,
        "clustering": options.clustering,
        "layers": layers,
    }


def sample_calibration(dense: PreTrainedModel, tokens: int, seed: int) -> Tensor:
    """Text of about ``tokens`` tokens sampled from the model, ``[N, S]`` in blocks of at most 256."""
    block_size = choose_block_size(None, context_length(dense.config))
    return sample_text(dense, blocks=-(-tokens // block_size), block_size=block_size, seed=seed)


def split_tokens(ids: Tensor, calibration_tokens: int, evaluation_tokens: int) -> tuple[Tensor, Tensor]:
    """Split blocks ``[N, S]`` into calibration blocks and held-out blocks; a short text in the same proportion.

    Raises:
        UserError: fewer than two blocks.
    """
    if len(ids) < 2:
        raise UserError("expected at least two blocks of calibration text, got less; give more text")
    share = calibration_tokens / (calibration_tokens + evaluation_tokens)
    wanted = max(2, -(-(calibration_tokens + evaluation_tokens) // ids.shape[1]))
    ids = ids[:wanted]
    cut = min(max(1, round(len(ids) * share)), len(ids) - 1)
    return ids[:cut], ids[cut:]


def _measured_graph(
    measured: Calibration,
    build: Callable[[], FedGraftForCausalLM],
    experts: list[LayerExperts],
    held_out: Tensor,
    report: Report,
    on_step: Step,
) -> tuple[FedGraftForCausalLM, dict[str, Any]]:
    """Graph that ``build`` makes, and its ``{"logit_difference", "perplexity"}``.

    What is measured on the dense model comes first, since ``build`` consumes its FFNs.
    """
    text, names = (held_out, held_out), _BASELINES[report]
    expected, perplexity = first_logits(measured.model, held_out), {}
    count = _counting(1 + (1 + len(names)) * len(SHARES), on_step)
    if report != Report.NONE:
        perplexity = baseline_perplexities(measured, experts, text, names=names, on_step=count)
    graph = build()
    difference = check_equality(expected, graph, held_out)
    if report != Report.NONE:
        add_router_perplexities(perplexity, graph, text, on_step=count)
    return graph, {"logit_difference": difference, "perplexity": perplexity}


def _counting(total: int, on_step: Step) -> Callable[[], None]:
    """Function that reports one more evaluation of ``total`` at each call."""
    done = itertools.count(1)
    return lambda: on_step("comparing routers", next(done), total)
