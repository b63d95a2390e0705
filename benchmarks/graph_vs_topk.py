"""Perplexity of an expert graph relative to a top-k MoE of the same experts, after the same training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.material import data_sources, mixed_blocks, model_path
from benchmarks.support.runner import Measured, OnStep, run_benchmark
from benchmarks.support.statistics import interval
from clients.training.trainer import LocalTraining, train_locally
from configs.schema import RunConfig
from federated.data.blocks import Blocks, batches
from models.bootstrap.build import BootstrapOptions, LayerExperts, build_graph, plan_experts
from models.checkpoints.load import load_dense
from models.graph.runtime_settings import Observer, observing_walks
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.remote_code.routing_fedgraft import Walk
from models.runtime.perplexity import evaluate_loss

DOMAINS = ("math_gsm8k", "medical_qa", "recipes", "law_dc")
ARMS = ("graph", "topk")


@dataclass(frozen=True)
class Settings:
    """Amounts of training and measurement.

    Attributes:
        domains: domains of the text.
        experts: E of each layer.
        visits: experts per token k.
        train_blocks: training blocks per domain.
        valid_blocks: held-out blocks per domain.
        calibration_blocks: training blocks of all domains for clusters, routers and edges.
        block_size: tokens per block.
        seeds: seeds of clustering and of the order of the text; one pair of arms each.
        training: local training of both arms.
    """

    domains: Sequence[str]
    experts: int
    visits: int
    train_blocks: int
    valid_blocks: int
    calibration_blocks: int
    block_size: int
    seeds: Sequence[int]
    training: LocalTraining


def _training(steps: int) -> LocalTraining:
    keys = RunConfig(
        local_steps=steps,
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=steps // 12,
        gain_learning_rate=10.0,
    )
    return LocalTraining.of(keys.training, autocast=False)


FULL = Settings(DOMAINS, 16, 4, 200, 24, 64, 256, (0, 1, 2), _training(60))
QUICK = Settings(DOMAINS[:2], 8, 2, 4, 2, 4, 64, (0, 1), _training(3))


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Train both arms from one bootstrap per seed and compare their held-out perplexity."""
    settings = QUICK if quick else FULL
    path, sources = model_path("mix7M", quick=quick), data_sources(settings.domains, quick=quick)
    pairs = []
    for index, seed in enumerate(settings.seeds):
        pairs.append(compare_arms(path, sources, settings, seed))
        on_step("seeds", index + 1, len(settings.seeds))
    ratios = [pair["graph"]["perplexity"] / pair["topk"]["perplexity"] for pair in pairs]
    low, high = interval(ratios)
    graphs = [pair["graph"] for pair in pairs]
    return Measured(
        figures={
            "ppl_ratio_ci_high": high,
            "selection_changed_share": fmean(graph["selection_changed_share"] for graph in graphs),
            "mean_abs_gain": fmean(graph["mean_abs_gain"] for graph in graphs),
        },
        peers={
            "ppl_ratio_mean": fmean(ratios),
            "ppl_ratio_ci_low": low,
            "ppl_ratio_seeds": ratios,
            "seeds": pairs,
            "setting": {
                "experts": settings.experts,
                "visits": settings.visits,
                "steps": settings.training.local_steps,
                "learning_rate": settings.training.learning_rate,
                "gain_learning_rate": settings.training.gain_learning_rate,
                "schedule": settings.training.schedule,
            },
        },
        notes={
            "ppl_ratio_ci_high": "perplexity of the graph over that of the top-k MoE after the same training, "
            "upper end of the 95 % interval over seeds; below 1 the graph is better",
            "selection_changed_share": "share of held-out visits to experts outside the top-k of the router logits",
            "mean_abs_gain": "mean |A[p, q]| over edges after training",
        },
    )


def compare_arms(path: str, sources: Sequence[str], settings: Settings, seed: int) -> dict[str, Any]:
    """Perplexities of both arms of one bootstrap before and after training, and size of the learned edge parameters."""
    train, valid = (_mixed(path, sources, settings, split, seed) for split in ("train", "valid"))
    dense = load_dense(path).float()
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    plan = BootstrapOptions(settings.experts, experts_per_token=settings.visits, seed=seed)
    experts = plan_experts(dense, train.input_ids[order[: settings.calibration_blocks]], plan)
    found: dict[str, Any] = {"seed": seed, "perplexity_dense": _perplexity(dense, valid)}
    for arm in ARMS:
        model = build_arm(dense, experts, settings.visits, arm)
        found["perplexity_before"] = _perplexity(
            model, valid
        )  # equal in both arms: gains and affinities start at zero
        stream = batches(train, 8, generator=torch.Generator().manual_seed(seed))
        losses = train_locally(model, stream, settings.training).losses
        found[arm] = {"train_loss": fmean(losses[-10:]), **trained_figures(model, valid)}
    return found


def build_arm(dense: Any, experts: Sequence[LayerExperts], visits: int, arm: str) -> FedGraftForCausalLM:
    """Graph of the planned experts; without edges for the arm ``topk``."""
    model = build_graph(dense, experts, visits)
    if arm == "topk":
        for layer in model.expert_layers():
            layer.get_buffer("edges").copy_(torch.eye(layer.num_experts, dtype=torch.bool))
    return model


def trained_figures(model: FedGraftForCausalLM, valid: Blocks) -> dict[str, float]:
    """Held-out perplexity, share of visits changed by affinities, and mean absolute gains and affinities of edges."""
    visits = torch.zeros(2, dtype=torch.int64)
    with observing_walks(model, lambda index: _count_changed(visits)):
        perplexity = _perplexity(model, valid)
    edges = [layer.get_buffer("edges").triu(1) for layer in model.expert_layers()]
    layers = list(zip(model.expert_layers(), edges, strict=True))
    gains = torch.cat([layer.edge_gain[mask] for layer, mask in layers])
    affinities = torch.cat([layer.edge_affinity[mask] for layer, mask in layers])
    outputs = torch.cat([layer.output_gain for layer in model.expert_layers()])
    return {
        "perplexity": perplexity,
        "selection_changed_share": int(visits[0]) / int(visits[1]),
        "edges": len(gains),
        "mean_abs_gain": _mean_abs(gains),
        "mean_abs_affinity": _mean_abs(affinities),
        "mean_abs_output_gain": _mean_abs(outputs),
    }


def outside_top_k(scores_TE: Tensor, experts_TK: Tensor) -> tuple[int, int]:
    """Number of visits to experts outside the top-k of their token's router logits, and number of all visits."""
    k = experts_TK.shape[-1]
    top_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(-1, scores_TE.topk(k, -1).indices, True)
    made_TK = experts_TK >= 0
    inside_TK = top_TE.gather(-1, experts_TK.clamp(min=0)) & made_TK
    return int((made_TK & ~inside_TK).sum()), int(made_TK.sum())


def _count_changed(visits: Tensor) -> Observer:
    def observe(layer: ExpertGraphMLP, scores_TE: Tensor, walk: Walk, weights_TK: Tensor) -> None:
        visits.add_(torch.tensor(outside_top_k(scores_TE, walk.experts_TK)))

    return observe


def _mixed(path: str, sources: Sequence[str], settings: Settings, split: str, seed: int) -> Blocks:
    training = split == "train"
    return mixed_blocks(
        sources,
        path,
        split=split,
        block_size=settings.block_size,
        max_blocks=settings.train_blocks if training else settings.valid_blocks,
        seed=seed if training else 0,  # the held-out text is the same for all seeds
    )


def _perplexity(model: Any, blocks: Blocks) -> float:
    return evaluate_loss(model, blocks.input_ids, blocks.labels).perplexity


def _mean_abs(values: Tensor) -> float:
    return float(values.detach().abs().mean()) if len(values) else 0.0


if __name__ == "__main__":
    run_benchmark("graph_vs_topk", measure)
