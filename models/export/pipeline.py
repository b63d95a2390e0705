"""Export of an expert graph: conversion, choice of the router scale, comparison on text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.choices import ExportedWeights, ExportFormat
from configs.errors import UserError
from models.export.dense import dense_model, not_representable
from models.export.deviation import Deviation, block_logits, mean_kl, measure_deviation
from models.export.lost import lost_in_mixture
from models.export.mixture import mixture_layers, mixture_model, scale_routers
from models.export.mixture_format import FORMATS
from models.export.router_scale import choose_exponent
from models.graph.runtime_settings import visiting
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

OnStep = Callable[[str, int, int | None], None]
# Exponents that the search starts from: where routers choose by shares of a softmax, and where by logits.
_START, _NEAR_EXACT_START = 10, 20


@dataclass(frozen=True, eq=False)
class ExportText:
    """Token blocks ``[N, S]``: text for fits and choices, and held-out text with labels for the comparison."""

    calibration: Tensor
    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        to: format; for a GGUF file that of the model in it.
        dtype: dtype of the written weights.
        gguf: type of the weights of a GGUF file; None for a checkpoint.
        equalise: pad layers with fewer routed experts than others.
        exponent: router rows are scaled by ``2 ** -exponent``; None: chosen by measurement.
    """

    to: ExportFormat
    dtype: torch.dtype = torch.float32
    gguf: ExportedWeights | None = None
    equalise: bool = False
    exponent: int | None = None


@dataclass(frozen=True, eq=False)
class Export:
    """Exported model with its deviation from the graph.

    Attributes:
        model: in fp32, with weights rounded to the dtype of the options.
        deviation: from the graph, on held-out text; for a dense model from the graph with every expert active.
        not_representable: properties that the format lacks, one line a kind.
        exponent: router rows are scaled by ``2 ** -exponent``; None for a dense model.
    """

    model: PreTrainedModel
    deviation: Deviation
    not_representable: list[str]
    exponent: int | None = None

    def figures(self) -> dict[str, Any]:
        """Values of a report: exactness, deviation, what is lost, router scale."""
        return {
            "exact": not self.not_representable,
            **self.deviation.figures(),
            "not_representable": self.not_representable,
            "router_exponent": self.exponent,
        }


@torch.no_grad()
def export_graph(
    graph: FedGraftForCausalLM,
    text: ExportText,
    options: ExportOptions,
    on_step: OnStep = lambda stage, done, total: None,
) -> Export:
    """Convert a graph in fp32 and compare the result with it.

    Args:
        graph: expert graph in fp32.
        text: text of the choice and of the comparison.
        options: format and options.
        on_step: called with the stage, the steps done and their total.

    Raises:
        UserError: as ``mixture_layers`` and ``mixture_model``.
    """
    if options.to == ExportFormat.DENSE:
        model, exponent, lost = dense_model(graph), None, not_representable(graph)
        _round(model, options)
    else:
        model, exponent = _mixture(graph, text, options, on_step)
        lost = lost_in_mixture(graph)
    every_expert = visiting(graph, graph.config.num_experts) if exponent is None else nullcontext()
    with every_expert:
        deviation = _compared(graph, model, text, on_step)
    return Export(model, deviation, lost, exponent)


@torch.no_grad()
def rounded_export(
    model: PreTrainedModel,
    text: ExportText,
    weights: ExportedWeights,
    on_step: OnStep = lambda stage, done, total: None,
) -> Export:
    """Round a copy of a plain model in fp32 to the weights of a GGUF file and compare it with the model."""
    from models.export.gguf_files.storage import round_to_gguf

    rounded = copy.deepcopy(model)
    round_to_gguf(rounded, weights)
    return Export(rounded, _compared(model, rounded, text, on_step), [])


def check_divergence(deviation: Deviation, most: float | None) -> None:
    """Check the mean divergence of an export against the largest one that its caller accepts.

    Raises:
        UserError: it is larger.
    """
    found = deviation.figures()["mean_kl"]
    if most is not None and not found <= most:
        raise UserError(
            f"expected a mean KL divergence of at most {most:g} nats per token, got {found:.3g}; nothing was written; "
            "raise `max_kl` or choose another format"
        )


def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the weights of a model to the values of a dtype, in place; their own dtype does not change."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def _compared(
    reference: PreTrainedModel, model: PreTrainedModel, text: ExportText, on_step: OnStep
) -> Deviation:
    """Deviation of a model from a reference on the held-out text."""
    return measure_deviation(
        reference,
        model,
        text.input_ids,
        text.labels,
        on_block=lambda done, total: on_step("comparing", done, total),
    )


def _round(model: PreTrainedModel, options: ExportOptions) -> None:
    if options.gguf is None:
        round_weights(model, options.dtype)
        return
    from models.export.gguf_files.storage import round_to_gguf

    round_to_gguf(model, options.gguf)


def _mixture(
    graph: FedGraftForCausalLM, text: ExportText, options: ExportOptions, on_step: OnStep
) -> tuple[PreTrainedModel, int]:
    layers = mixture_layers(graph, options.to, text.calibration, equalise=options.equalise)
    start = _NEAR_EXACT_START if FORMATS[options.to].near_exact else _START
    model = mixture_model(graph, options.to, layers, start)
    _round(model, options)
    router_dtype = torch.float32 if options.gguf else options.dtype
    exponent, tried = options.exponent, 0

    def divergence(exponent: int) -> float:
        nonlocal tried
        scale_routers(model, layers, exponent, router_dtype)
        tried += 1
        on_step("choosing the router scale", tried, None)
        return mean_kl(expected, model, text.calibration)

    if exponent is None:
        expected = list(block_logits(graph, text.calibration))
        exponent = choose_exponent(divergence, start)
    scale_routers(model, layers, exponent, router_dtype)
    return model, exponent
