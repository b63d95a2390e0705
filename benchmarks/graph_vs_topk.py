"""Does the graph earn its place? The same experts with edges and as a flat top-k mixture, trained alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.material import data_sources, domain_blocks, model_path
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
    """How much is trained and measured.

    Attributes:
        domains: whose text is mixed.
        experts: E of each layer.
        visits: k.
        train_blocks: of each domain.
        valid_blocks: of each domain.
        calibration_blocks: of the mixed training text, for clusters, routers and edges.
        block_size: tokens of a block.
        seeds: of clustering and of the order of the text; one pair of arms each.
        training: of both arms.
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
            "ppl_ratio_ci_high": "perplexity of the graph over that of the flat mixture after the same training, "
            "upper end of the 95 % interval over seeds; below 1 the graph is better",
            "selection_changed_share": "held-out visits to an expert outside the top-k of the raw scores",
            "mean_abs_gain": "mean |A[p, q]| over the edges after training",
        },
    )


def compare_arms(path: str, sources: Sequence[str], settings: Settings, seed: int) -> dict[str, Any]:
    """Both arms from one bootstrap: perplexities before and after training, and how far the graph has learned."""
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
        )  # equal in both arms: gains and affinities are zero
        stream = batches(train, 8, generator=torch.Generator().manual_seed(seed))
        losses = train_locally(model, stream, settings.training).losses
        found[arm] = {"train_loss": fmean(losses[-10:]), **trained_figures(model, valid)}
    return found


def build_arm(dense: Any, experts: Sequence[LayerExperts], visits: int, arm: str) -> FedGraftForCausalLM:
    """The graph as it was planned, or (``topk``) the same experts without an edge."""
    model = build_graph(dense, experts, visits)
    if arm == "topk":
        for layer in model.expert_layers():
            layer.get_buffer("edges").copy_(torch.eye(layer.num_experts, dtype=torch.bool))
    return model


def trained_figures(model: FedGraftForCausalLM, valid: Blocks) -> dict[str, float]:
    """Held-out perplexity, how many visits the affinities changed, and the size of gains and affinities on edges."""
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
    """Visits to an expert that is not among the K best raw scores of its token, and all visits."""
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
    count = settings.train_blocks if split == "train" else settings.valid_blocks
    parts = [
        domain_blocks(
            source,
            path,
            split=split,
            block_size=settings.block_size,
            max_blocks=count,
            seed=seed if split == "train" else 0,  # all seeds are measured on one text
        )
        for source in sources
    ]
    return Blocks(torch.cat([part.input_ids for part in parts]), torch.cat([part.labels for part in parts]))


def _perplexity(model: Any, blocks: Blocks) -> float:
    return math.exp(evaluate_loss(model, blocks.input_ids, blocks.labels).mean)


def _mean_abs(values: Tensor) -> float:
    return float(values.detach().abs().mean()) if len(values) else 0.0


if __name__ == "__main__":
    run_benchmark("graph_vs_topk", measure)
