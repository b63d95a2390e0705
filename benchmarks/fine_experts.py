"""Time of graph layers with many small experts, half of them visited, relative to the dense FFN of the same width.

Each layer runs by the rows of its experts, as one wide FFN, and by the way that it chooses itself. Edges have zero
gains, as after a bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.support.runner import Measured, OnStep, run_benchmark
from benchmarks.support.statistics import alternate, median_ratio
from models.remote_code.experts_fedgraft import ExpertGraphMLP

WIDTH, NEURONS, EDGES = 576, 1536, 4  # the layers of SmolLM2-135M
WAYS: dict[str, bool | None] = {"rows": False, "wide": True, "chosen": None}
_CHOICE = "models.remote_code.weights_fedgraft.wide_is_faster"


@dataclass(frozen=True)
class Case:
    """Number of experts E, tokens T of one pass, dtype of weights and products, forward or also backward."""

    experts: int
    tokens: int
    dtype: str
    training: bool


def cases(quick: bool) -> list[Case]:
    """Cases of the benchmark; one token only without gradients, as in decoding."""
    experts, tokens = ((16,), (1, 8)) if quick else ((16, 64, 128), (1, 256, 2048))
    return [
        Case(each, count, dtype, training)
        for dtype in ("float32", "bfloat16")
        for each in experts
        for count in tokens
        for training in (False, True)
        if count > 1 or not training
    ]


def fine_layer(experts: int, dtype: torch.dtype) -> ExpertGraphMLP:
    """Layer of ``experts`` experts with random weights, ``EDGES`` edges per expert and zero gains and affinities."""
    layer = ExpertGraphMLP(
        hidden_size=WIDTH, expert_size=NEURONS // experts, num_experts=experts, num_visits=experts // 2
    )
    with torch.no_grad():
        for weight in (layer.gate_up_proj, layer.down_proj, layer.router.weight):
            weight.normal_(std=0.02)
        for expert in range(experts):
            layer.edges[expert, torch.randperm(experts - expert - 1)[:EDGES] + expert + 1] = True
    for weight in (layer.gate_up_proj, layer.down_proj):
        weight.data = weight.data.to(dtype)
    layer.edge_gain.requires_grad_(False)
    return layer


def one_pass(module: nn.Module, x_TD: Tensor, *, training: bool) -> Callable[[], None]:
    """Function that runs ``module`` forward, or forward and backward."""

    def run() -> None:
        module.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(training):
            result_TD = module(x_TD.detach().requires_grad_(training))
        if training:
            result_TD.sum().backward()

    return run


def by_way(run: Callable[[], None], wide: bool | None) -> Callable[[], None]:
    """``run`` with layers that run wide, by rows, or as they choose (None)."""
    if wide is None:
        return run

    def forced() -> None:
        with mock.patch(_CHOICE, lambda **_: wide):
            run()

    return forced


def measure_case(case: Case, repeats: int) -> dict[str, float]:
    """Time of each way over that of the dense FFN, and of the chosen way over that of the faster one."""
    dtype = getattr(torch, case.dtype)
    dense = LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=NEURONS)).to(dtype)
    layer, x_TD = fine_layer(case.experts, dtype), torch.randn(case.tokens, WIDTH, dtype=dtype)
    runs = {"dense": one_pass(dense, x_TD, training=case.training)}
    runs |= {name: by_way(one_pass(layer, x_TD, training=case.training), wide) for name, wide in WAYS.items()}
    seconds = alternate(runs, repeats=repeats * (10 if case.tokens == 1 else 1))
    ratios = {name: median_ratio(seconds[name], seconds["dense"]) for name in WAYS}
    return ratios | {"chosen_over_best": ratios["chosen"] / min(ratios["rows"], ratios["wide"])}


def measure(quick: bool, on_step: OnStep) -> Measured:
    """All cases in one thread; the figures are those of 64 experts."""
    torch.manual_seed(0)
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for done, case in enumerate(wanted := cases(quick)):
            found.append((case, measure_case(case, 2 if quick else 7)))
            on_step("layers", done + 1, len(wanted))
    finally:
        torch.set_num_threads(threads)
    experts, tokens = (16, 8) if quick else (64, 2048)
    times = {
        (case.dtype, case.training, case.tokens): ratios for case, ratios in found if case.experts == experts
    }
    return Measured(
        figures={
            "forward_over_dense": times["float32", False, tokens]["chosen"],
            "forward_over_dense_bf16": times["bfloat16", False, tokens]["chosen"],
            "training_over_dense": times["float32", True, tokens]["chosen"],
            "training_over_dense_bf16": times["bfloat16", True, tokens]["chosen"],
            "decoding_over_dense": times["float32", False, 1]["chosen"],
            "forward_rows_over_dense": times["float32", False, tokens]["rows"],
            "chosen_over_best_max": max(ratios["chosen_over_best"] for _, ratios in found),
        },
        peers={"cases": [asdict(case) | ratios for case, ratios in found], "threads": 1},
    )


if __name__ == "__main__":
    run_benchmark("fine_experts", measure)
