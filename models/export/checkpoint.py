"""Export of a checkpoint: an expert graph to any format, another model to the format that it has or to a GGUF file."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from configs.choices import ExportedWeights, ExportFormat, GgufModel
from configs.errors import UserError
from configs.output import check_free_space, check_output_directory, new_directory
from models.checkpoints.load import load_causal_lm, load_graph, load_tokenizer
from models.checkpoints.save import cast_weights, save_checkpoint
from models.export.card import CardFacts, write_card
from models.export.deviation import Deviation
from models.export.own_format import check_own_format, copy_checkpoint
from models.export.pipeline import (
    Export,
    ExportOptions,
    ExportText,
    OnStep,
    check_divergence,
    export_graph,
    rounded_export,
)
from models.files.config_file import check_is_graph, read_config, read_dtype
from models.files.safetensors_files import weight_bytes
from models.files.side_files import local_checkpoint
from models.remote_code.configuration_fedgraft import FedGraftConfig
from models.runtime.perplexity import evaluate_loss
from models.runtime.precision import precision_name

_DTYPES = {
    ExportedWeights.FP32: torch.float32,
    ExportedWeights.BF16: torch.bfloat16,
    ExportedWeights.FP16: torch.float16,
}


@dataclass(frozen=True)
class ExportRequest:
    """One export.

    Attributes:
        source: directory or hub id of the model.
        out: new directory.
        to: format.
        weights: type of the written weights.
        gguf_model: model in a GGUF file of an expert graph.
        equalise: pad layers with fewer routed experts than others.
        exponent: router rows are scaled by ``2 ** -exponent``; None: chosen by measurement.
        max_kl: largest mean divergence in nats per token; None: any.
        overwrite: whether ``out`` may be replaced.
        card: names of base, licence and data for the model card.
    """

    source: str
    out: Path
    to: ExportFormat = ExportFormat.DENSE
    weights: ExportedWeights = ExportedWeights.AUTO
    gguf_model: GgufModel = GgufModel.AUTO
    equalise: bool = False
    exponent: int | None = None
    max_kl: float | None = None
    overwrite: bool = False
    card: CardFacts = field(default_factory=CardFacts)

    @property
    def of_graph(self) -> bool:
        """Whether the model is an expert graph."""
        return read_config(self.source).model_type == FedGraftConfig.model_type


def check_export(request: ExportRequest) -> None:
    """Check an export before its model is read.

    Raises:
        UserError: the output cannot be written, the model has another format, weights that the format lacks, or the
            package ``gguf`` is missing.
    """
    check_output_directory(request.out, overwrite=request.overwrite)
    config = read_config(request.source)
    if request.to == ExportFormat.GGUF:
        if importlib.util.find_spec("gguf") is None:
            raise UserError(
                "expected the package gguf to write a GGUF file, found none; install it: bash scripts/install.sh gguf"
            )
        if not request.of_graph:
            from models.export.gguf_files.write import architecture_of

            architecture_of(config)
        return
    if request.weights == ExportedWeights.Q8_0:
        raise UserError(
            f"expected weights of type fp32, bf16 or fp16 for {request.to}, got q8_0; set `to` to gguf"
        )
    if request.to == ExportFormat.DENSE:
        check_is_graph(config, request.source)
    elif not request.of_graph:
        check_own_format(config, request.to, request.source)


def export_checkpoint(
    request: ExportRequest, text: ExportText, on_step: OnStep = lambda stage, done, total: None
) -> dict[str, Any]:
    """Write an export that ``check_export`` accepts.

    Args:
        request: model, format and options.
        text: text of choices and of the comparison.
        on_step: called with the stage, the steps done and their total.

    Returns:
        ``{"out", "to", "exact", "mean_kl", "mean_logit_difference", "max_logit_difference", "argmax_agreement",
        "perplexity": {"before", "after"}, "tokens", "not_representable", "router_exponent", "weights"}``, and ``file``
        of a GGUF file.

    Raises:
        UserError: as ``export_graph``, ``write_gguf`` and ``check_divergence``; nothing is written.
    """
    head = {"out": str(request.out), "to": request.to}
    if request.to != ExportFormat.GGUF:
        return head | (_write_graph(request, text, on_step) if request.of_graph else _copy(request, text))
    return head | _write_gguf(request, text, on_step)


def _write_graph(request: ExportRequest, text: ExportText, on_step: OnStep) -> dict[str, Any]:
    dtype = _DTYPES.get(request.weights) or read_dtype(request.source)
    exported = _exported(request, text, ExportOptions(request.to, dtype), on_step)
    size = sum(parameter.numel() for parameter in exported.model.parameters()) * dtype.itemsize
    with new_directory(request.out, overwrite=request.overwrite, size=size) as directory:
        save_checkpoint(cast_weights(exported.model, dtype), load_tokenizer(request.source), directory)
        result = exported.figures() | {"weights": precision_name(exported.model)}
        _write_card(request, directory, result)
    return result


def _exported(request: ExportRequest, text: ExportText, options: ExportOptions, on_step: OnStep) -> Export:
    graph = load_graph(request.source, precision="fp32")
    width = 1 if options.gguf == ExportedWeights.Q8_0 else options.dtype.itemsize
    check_free_space({request.out: sum(parameter.numel() for parameter in graph.parameters()) * width})
    options = replace(options, equalise=request.equalise, exponent=request.exponent)
    exported = export_graph(graph, text, options, on_step)
    check_divergence(exported.deviation, request.max_kl)
    return exported


def _write_gguf(request: ExportRequest, text: ExportText, on_step: OnStep) -> dict[str, Any]:
    from models.export.gguf_files.write import architecture_of, write_gguf

    weights = ExportedWeights.FP16 if request.weights == ExportedWeights.AUTO else request.weights
    if request.of_graph:
        inner = _gguf_model(request)
        dtype = _DTYPES.get(weights, torch.float16)
        exported = _exported(request, text, ExportOptions(inner, dtype, weights), on_step)
    else:
        model = load_causal_lm(request.source, precision="fp32")
        exported = rounded_export(model, text, weights, on_step)
        check_divergence(exported.deviation, request.max_kl)
    architecture_of(exported.model.config)
    name = f"model-{weights}.gguf"
    with new_directory(request.out, overwrite=request.overwrite) as directory:
        write_gguf(exported.model, load_tokenizer(request.source), directory / name, weights)
        result = exported.figures() | {"weights": str(weights), "file": str(request.out / name)}
        _write_card(request, directory, result)
    return result


def _write_card(request: ExportRequest, directory: Path, result: dict[str, Any]) -> None:
    source = local_checkpoint(request.source)
    write_card(directory, source, request.card, {**result, "to": request.to}, name=request.out.name)


def _gguf_model(request: ExportRequest) -> ExportFormat:
    if request.gguf_model != GgufModel.AUTO:
        return ExportFormat(request.gguf_model)
    shared = any(read_config(request.source).num_shared or [])
    return ExportFormat.QWEN2_MOE if shared else ExportFormat.MIXTRAL


def _copy(request: ExportRequest, text: ExportText) -> dict[str, Any]:
    """Copy a mixture of experts that has the format, and measure its perplexity."""
    source = local_checkpoint(request.source)
    model: PreTrainedModel = load_causal_lm(str(source), precision="auto")
    loss = evaluate_loss(model, text.input_ids, text.labels)
    size = weight_bytes(str(source))
    with new_directory(request.out, overwrite=request.overwrite, size=size) as directory:
        copy_checkpoint(source, directory)
    exported = Export(model, Deviation(before=loss, after=loss, agreed=loss.tokens), [])
    return exported.figures() | {"weights": precision_name(model)}
