"""Exports of one bootstrapped graph in memory, and their deviation on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.support.bootstrap.layerwise import MIXES
from benchmarks.support.material import data_sources, mixed_blocks, model_path
from configs.choices import ExportFormat
from federated.data.blocks import Blocks
from models.bootstrap.build import BootstrapOptions, build_graph, plan_experts
from models.checkpoints.load import load_dense
from models.export.deviation import Deviation, block_logits, token_deviation
from models.export.mixture_format import FORMATS
from models.export.pipeline import Export, ExportOptions, ExportText, export_graph
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


@dataclass(frozen=True)
class Amounts:
    """Size of one measurement.

    Attributes:
        experts: E of each layer; half of them are visited.
        block_size: tokens per block.
        calibration: blocks of training text per domain, for the bootstrap.
        choice: blocks of training text for the choice of the router scale.
        held_out: blocks of held-out text per domain.
    """

    experts: int
    block_size: int = 256
    calibration: int = 4
    choice: int = 8
    held_out: int = 2


@dataclass(frozen=True, eq=False)
class Material:
    """Graph in fp32, with shared experts and without default outputs, and text."""

    graph: FedGraftForCausalLM
    text: ExportText


def material(name: str, amounts: Amounts, *, quick: bool) -> Material:
    """Bootstrap the dense model ``name`` on training text of all domains."""
    path, sources = model_path(name, quick=quick), data_sources(MIXES["all"], quick=quick)

    def blocks(split: str, count: int) -> Blocks:
        return mixed_blocks(sources, path, split=split, block_size=amounts.block_size, max_blocks=count)

    train, held_out = blocks("train", amounts.calibration).input_ids, blocks("valid", amounts.held_out)
    dense = load_dense(path, dtype=torch.float32)
    options = BootstrapOptions.of_router(amounts.experts, dense.config.hidden_size, default_rank=0)
    graph = build_graph(dense, plan_experts(dense, train, options), options.visits)
    choice = train[:: max(1, len(train) // amounts.choice)]
    return Material(graph, ExportText(choice, held_out.input_ids, held_out.labels))


def exports(found: Material, on_export: Callable[[], None]) -> dict[ExportFormat, Export]:
    """Export of the graph to every mixture of experts, in fp32."""
    result = {}
    for to in FORMATS:
        result[to] = export_graph(found.graph, found.text, ExportOptions(to))
        on_export()
    return result


def rounding(found: Material) -> Deviation:
    """Deviation of the graph itself with weights and matrix products in bf16."""
    text, total = found.text, Deviation()
    exact = list(block_logits(found.graph, text.input_ids))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = list(block_logits(found.graph, text.input_ids))
    for one, other, labels in zip(exact, rounded, text.labels, strict=True):
        total += token_deviation(one[:-1], other[:-1], labels[1:])
    return total


def probes(found: Material, count: int, length: int) -> list[Tensor]:
    """Pieces ``[length]`` of held-out blocks for the comparison with llama.cpp; ``length`` divides that of a block."""
    starts = found.text.input_ids.view(-1, length)
    return list(starts[:: max(1, len(starts) // count)][:count])
