"""Healing of a graph checkpoint: load, measure, train, measure, write."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.directory_placement import staging_parent
from configs.errors import UserError
from configs.output import check_output_directory, new_directory
from configs.paths import cache_folder
from models.checkpoints.load import load_dense, load_graph, load_tokenizer
from models.checkpoints.save import cast_weights, save_checkpoint
from models.files.config_file import check_is_dense, check_is_graph, read_config, read_dtype
from models.files.fingerprint import checkpoint_fingerprint, fingerprint
from models.files.safetensors_files import weight_bytes
from models.healing.loop import Distillation, distill
from models.healing.options import HealingOptions
from models.healing.parameters import finish_parameters, select_parameters
from models.healing.report import HeldOutReport
from models.healing.state import Progress
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.runtime.perplexity import IGNORED
from models.runtime.precision import autocast_to_bf16

Step = Callable[[str, int, int | None], None]

_REPORTED = ("tokens", "seconds", "core_seconds", "losses")
_SHAPES = ("vocab_size", "hidden_size", "num_hidden_layers")


@dataclass(frozen=True)
class HealingText:
    """Training and held-out blocks.

    Attributes:
        input_ids: training text, ``[N, S]``.
        labels: ``[N, S]``; -100 at padding.
        held_out_ids: held-out text.
        held_out_labels: its labels.
    """

    input_ids: Tensor
    labels: Tensor
    held_out_ids: Tensor
    held_out_labels: Tensor


def heal_checkpoint(
    *,
    graph: str,
    base: str,
    out: Path,
    text: HealingText,
    options: HealingOptions,
    device: str = "cpu",
    overwrite: bool = False,
    on_step: Step = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Train the graph at ``graph`` by distillation from the dense model at ``base``; write the result to ``out``.

    Weights train in fp32 and are written in the dtype of the graph. An interrupted run leaves the file
    ``state_path(out)``, from which the same call continues.

    Args:
        graph: directory or hub id of an expert graph.
        base: directory or hub id of its dense base.
        out: new directory, written last. It has no recipe: its weights are not those of the base.
        text: training and held-out blocks.
        options: options of healing.
        device: device of the computation.
        overwrite: replace ``out`` if it is not empty.
        on_step: called with the name of a stage, the steps done and their total.

    Returns:
        ``{"out", "trained_parameters"}``, the figures of ``HeldOutReport``, and of ``Progress`` "steps", "tokens",
        "seconds", "core_seconds" and "losses".

    Raises:
        UserError: unusable checkpoints, a base of another shape, a loss that is not finite, a state of another run.
    """
    check_pair(graph, base)
    check_output_directory(out, overwrite=overwrite, size=weight_bytes(graph))
    student = load_graph(graph, precision="fp32", device=device)
    dense = _load_base(base, student.config.base_fingerprint, device)
    shown = partial(on_step, "held-out perplexity")
    report = HeldOutReport(dense, text.held_out_ids, text.held_out_labels, shown)
    report.measure(student, "before")
    autocast, state = autocast_to_bf16(options.precision, device), state_path(out)
    job = Distillation(student, dense, text.input_ids, text.labels != IGNORED, autocast)
    facts = _facts(graph, base, text, autocast)
    progress, trained = _train(job, options, state, facts, partial(on_step, "healing steps"))
    _round_weights(student, read_dtype(graph))
    report.measure(student, "after")
    with new_directory(out, overwrite=overwrite) as directory:
        save_checkpoint(cast_weights(student, read_dtype(graph)), load_tokenizer(graph), directory)
    state.unlink(missing_ok=True)
    return {"out": str(out), **report.figures(), **_summary(progress), "trained_parameters": trained}


def _train(
    job: Distillation,
    options: HealingOptions,
    state_file: Path,
    facts: Mapping[str, Any],
    on_step: Callable[[int, int | None], None],
) -> tuple[Progress, int]:
    """Train the graph of ``job``; its progress, and the number of trained parameters."""
    parameters = select_parameters(job.graph, options.train, rank=options.rank, seed=options.seed)
    own = {name: value for name, value in asdict(options).items() if name != "save_seconds"}
    progress = distill(
        job,
        parameters,
        options,
        state_file=state_file,
        settings={**own, **facts},
        on_step=lambda done, total: on_step(done, total or None),
    )
    finish_parameters(job.graph)
    return progress, sum(value.numel() for value in parameters.values())


def state_path(out: Path) -> Path:
    """Path of the state of an interrupted healing that writes ``out``.

    Beside ``out``, or in the user-cache folder where ``out`` is a mount point or its parent is not writable.
    """
    out = out.absolute()
    if staging_parent(out) == out.resolve():
        name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
        return cache_folder() / "healing" / f"{name}.safetensors"
    return out.with_name(f".{out.name}.healing.safetensors")


def check_pair(graph: str, base: str) -> None:
    """Check that two checkpoints are an expert graph and a dense model of the same shape, by their configurations.

    Raises:
        UserError: names the first value that differs.
    """
    student, dense = read_config(graph), read_config(base)
    check_is_graph(student, graph)
    check_is_dense(dense, base)
    for name in _SHAPES:
        wanted, found = getattr(student, name), getattr(dense, name)
        if wanted != found:
            raise UserError(
                f"expected a base with {name} = {wanted}, as the graph in {graph} has, got {found} in {base}; name the "
                "dense model that the graph was made from"
            )


def _load_base(base: str, graph_fingerprint: str, device: str) -> PreTrainedModel:
    """The dense model in fp32, with a warning where it is not the one that the graph was made from."""
    dense = load_dense(base, device=device)
    if graph_fingerprint and fingerprint(dense) != graph_fingerprint:
        warnings.warn(
            f"the graph was made from a dense model with other weights than {base}; it is trained towards those",
            stacklevel=3,
        )
    return cast_weights(dense, torch.float32)


def _round_weights(graph: FedGraftForCausalLM, dtype: torch.dtype) -> None:
    """Round the fp32 weights to values of ``dtype``, as a checkpoint of that dtype holds them."""
    cast_weights(cast_weights(graph, dtype), torch.float32)


def _facts(graph: str, base: str, text: HealingText, autocast: bool) -> dict[str, Any]:
    """Facts of a run, other than its options, that the continuation of an interrupted one must have, too."""
    words = hashlib.sha256()
    for tensor in (text.input_ids, text.labels):
        words.update(tensor.contiguous().numpy().tobytes())
    return {
        "graph": checkpoint_fingerprint(graph),
        "base": checkpoint_fingerprint(base),
        "data": words.hexdigest(),
        "precision": "bf16" if autocast else "fp32",
    }


def _summary(progress: Progress) -> dict[str, Any]:
    facts = asdict(progress)
    return {"steps": progress.step, **{name: facts[name] for name in _REPORTED}}
