"""Training and decoding time of one expert-graph layer relative to transformers' dense FFN of the same width.

The graph has four edges per expert and non-zero gains and affinities. Two alternatives are timed too: automatic
differentiation of the plain loop over experts and, where this build of torch has it, a grouped matrix product.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.support.runner import Measured, OnStep, run_benchmark
from benchmarks.support.statistics import alternate, median_ratio
from models.remote_code.dispatch_fedgraft import dispatch, find_links
from models.remote_code.execution_fedgraft import gated, gated_ffn, run_visits
from models.remote_code.experts_fedgraft import ExpertGraphMLP

THREADS = 2
EXPERTS, VISITS, DECODE_VISITS, EDGES = 16, 4, 8, 4


@dataclass(frozen=True)
class Shape:
    """Hidden size D, FFN width m, tokens T of one pass."""

    hidden_size: int
    ffn_size: int
    tokens: int


def random_graph_layer(shape: Shape, visits: int) -> ExpertGraphMLP:
    """Layer with random weights, gains and affinities, and ``EDGES`` edges per expert or all possible ones."""
    layer = ExpertGraphMLP(
        hidden_size=shape.hidden_size,
        expert_size=shape.ffn_size // EXPERTS,
        num_experts=EXPERTS,
        num_visits=visits,
    )
    with torch.no_grad():
        for weight in (layer.gate_up_proj, layer.down_proj, layer.router.weight):
            weight.normal_(std=0.02)
        for gain in (layer.edge_gain, layer.edge_affinity, layer.output_gain):
            gain.normal_(std=0.1)
        for expert in range(EXPERTS):
            later = torch.randperm(EXPERTS - expert - 1)[:EDGES] + expert + 1
            layer.edges[expert, later] = True
    return layer


def training_pass(module: nn.Module, x: Tensor, *, autocast: bool) -> Callable[[], None]:
    """Function that runs ``module`` forward and backward, with gradients of the input and of all parameters."""

    def run() -> None:
        module.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            module(x.detach().requires_grad_()).sum().backward()

    return run


def measure_training(
    shape: Shape, *, autocast: bool, repeats: int, on_repeat: Callable[[int], None]
) -> dict[str, float]:
    """Seconds of a training pass of the dense FFN and of the graph layer, and the median of their ratios."""
    dense = LlamaMLP(LlamaConfig(hidden_size=shape.hidden_size, intermediate_size=shape.ffn_size))
    layer, x = random_graph_layer(shape, VISITS), torch.randn(1, shape.tokens, shape.hidden_size)
    runs = {"dense": dense, "graph": layer, "loop": ComposedLoop(layer)}
    passes = {name: training_pass(module, x, autocast=autocast) for name, module in runs.items()}
    seconds = alternate(passes, repeats=repeats, on_repeat=on_repeat)
    return {
        "speedup": median_ratio(seconds["dense"], seconds["graph"]),
        "speedup_plain_loop": median_ratio(seconds["dense"], seconds["loop"]),
    } | {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}


class ComposedLoop(nn.Module):
    """A graph layer executed by ``run_visits`` under automatic differentiation."""

    def __init__(self, layer: ExpertGraphMLP) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        layer, x_TD = self.layer, hidden_states.flatten(0, -2)
        walk = layer.walk(layer.router(x_TD))
        visits = dispatch(walk.experts_TK, layer.num_experts)
        links = find_links(visits, layer.edges.triu(1), len(x_TD))
        weights = list(zip(layer.gate_up_proj.unbind(), layer.down_proj.unbind(), strict=True))
        return run_visits(
            x_TD,
            layer.output_weights(walk),
            layer.edge_gain,
            visits,
            links,
            lambda expert, rows: gated_ffn(layer.act_fn, rows, *weights[expert]),
        ).view_as(hidden_states)


def measure_walk_share(shape: Shape, *, repeats: int, on_repeat: Callable[[int], None]) -> float:
    """Time of router and walk over that of the whole layer, forward and backward."""
    layer, x = random_graph_layer(shape, VISITS), torch.randn(1, shape.tokens, shape.hidden_size)

    def route() -> None:
        layer.zero_grad(set_to_none=True)
        walk = layer.walk(layer.router(x[0].detach().requires_grad_()))
        layer.output_weights(walk).sum().backward()

    seconds = alternate(
        {"walk": route, "layer": training_pass(layer, x, autocast=False)},
        repeats=repeats,
        on_repeat=on_repeat,
    )
    return median_ratio(seconds["walk"], seconds["layer"])


@torch.no_grad()
def measure_decoding(
    shape: Shape, *, steps: int, repeats: int, on_repeat: Callable[[int], None]
) -> dict[str, float]:
    """Time per decoded token over that of the dense FFN, with ``DECODE_VISITS`` of ``EXPERTS`` experts per token."""
    dense = LlamaMLP(LlamaConfig(hidden_size=shape.hidden_size, intermediate_size=shape.ffn_size))
    layer, tokens = random_graph_layer(shape, DECODE_VISITS), torch.randn(steps, 1, 1, shape.hidden_size)
    runs = {"dense": lambda: [dense(x) for x in tokens], "graph": lambda: [layer(x) for x in tokens]}
    seconds = alternate(runs, repeats=repeats, on_repeat=on_repeat)
    return {"ratio": median_ratio(seconds["graph"], seconds["dense"])} | {
        f"{name}_seconds_per_token": statistics.median(values) / steps for name, values in seconds.items()
    }


@torch.no_grad()
def measure_grouped(shape: Shape, *, repeats: int, on_repeat: Callable[[int], None]) -> float | None:
    """Time of a grouped matrix product over a loop over experts, bf16, without edges; None if torch has none."""
    grouped = getattr(nn.functional, "grouped_mm", None)
    if grouped is None:
        return None
    layer = random_graph_layer(shape, VISITS).to(torch.bfloat16)
    rows = torch.randn(shape.tokens * VISITS, shape.hidden_size, dtype=torch.bfloat16)
    size = len(rows) // EXPERTS
    ends = torch.arange(size, len(rows) + 1, size, dtype=torch.int32)
    gate_up, down = layer.gate_up_proj.transpose(1, 2), layer.down_proj.transpose(1, 2)

    def loop() -> None:
        for part, one, other in zip(rows.split(size), layer.gate_up_proj, layer.down_proj, strict=True):
            gated_ffn(layer.act_fn, part, one, other)

    def group() -> None:
        grouped(gated(layer.act_fn, grouped(rows, gate_up, offs=ends)), down, offs=ends)

    seconds = alternate({"loop": loop, "grouped": group}, repeats=repeats, on_repeat=on_repeat)
    return median_ratio(seconds["grouped"], seconds["loop"])


def measure(quick: bool, on_step: OnStep) -> Measured:
    """All figures of the layer, each relative to a peer whose timings are interleaved."""
    torch.manual_seed(0)
    threads, repeats = torch.get_num_threads(), 2 if quick else 9
    small = Shape(64, 256, 128) if quick else Shape(1024, 4096, 2048)
    large = Shape(64, 256, 128) if quick else Shape(2048, 5632, 2048)

    def showing(stage: str, times: int) -> Callable[[int], None]:
        return lambda done: on_step(stage, done, times + 1)

    torch.set_num_threads(THREADS)
    try:
        fp32 = measure_training(small, autocast=False, repeats=repeats, on_repeat=showing("fp32", repeats))
        bf16 = measure_training(large, autocast=True, repeats=repeats, on_repeat=showing("bf16", repeats))
        walk = measure_walk_share(small, repeats=repeats, on_repeat=showing("walk", repeats))
        decode = measure_decoding(small, steps=20, repeats=repeats, on_repeat=showing("decoding", repeats))
        grouped = measure_grouped(small, repeats=repeats, on_repeat=showing("grouped products", repeats))
    finally:
        torch.set_num_threads(threads)
    return Measured(
        figures={
            "speedup_fp32_k4": fp32["speedup"],
            "speedup_bf16_k4": bf16["speedup"],
            "walk_share": walk,
            "decode_ratio_k8": decode["ratio"],
        },
        peers={
            "fp32": fp32,
            "bf16": bf16,
            "decode": decode,
            "grouped_over_loop_bf16": grouped,
            "threads": THREADS,
        },
        notes={"speedup_bf16_k4": "fp32 weights under autocast to bf16, as in clients"},
    )


if __name__ == "__main__":
    run_benchmark("layer", measure)
