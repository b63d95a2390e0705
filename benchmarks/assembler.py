"""Perplexity of a client after local training with residents chosen by four rules, at the same budget.

Each client has the text of one domain. Residents are: ``learned``, the choice of a client (experts of the trained
assembler, or the most used ones if these reach the lower loss in trial training); ``usage``, the experts that the
client's tokens select most often; ``random``. All train the same number of steps on the same batches; ``usage, more
steps`` trains the most-used experts for as many additional steps as the assembler takes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from benchmarks.support.material import bootstrapped, data_sources, domain_blocks, model_path
from benchmarks.support.runner import Measured, OnStep, run_benchmark
from benchmarks.support.statistics import interval
from clients.residents.assembler import Assembler, choose_residents
from clients.residents.assembly import assemble
from clients.training.trainer import LocalTraining, train_locally
from configs.schema import RunConfig
from federated.data.blocks import Blocks, batches
from models.graph.runtime_settings import scaled_visits, set_residents, visiting
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.runtime.perplexity import evaluate_loss

ARMS = ("learned", "usage", "random", "usage, more steps")
_BATCH = 8


@dataclass(frozen=True)
class Settings:
    """Amounts of training and measurement.

    Attributes:
        domains: domain of each client.
        experts: E of each layer.
        budgets: seeds to measure, by number of residents per layer.
        train_blocks: training blocks per client.
        valid_blocks: held-out blocks per client.
        block_size: tokens per block.
        calibration_tokens: tokens sampled from the model for the bootstrap.
        training: local training of every arm.
    """

    domains: Sequence[str]
    experts: int
    budgets: dict[int, Sequence[int]]
    train_blocks: int
    valid_blocks: int
    block_size: int
    calibration_tokens: int
    training: LocalTraining


FULL = Settings(
    ("math_gsm8k", "medical_qa", "recipes", "law_dc", "code_algos", "stories"),
    16,
    {4: (1, 2, 3), 8: (1, 2, 3)},
    128,
    24,
    256,
    8192,
    # Linear decay: at a constant learning rate the order of the text alone changes a client's perplexity by 5 %.
    LocalTraining.of(
        RunConfig(local_steps=20, learning_rate=1e-3, schedule="linear").training, autocast=False
    ),
)
QUICK = Settings(("a", "b"), 8, {2: (0, 1)}, 4, 2, 32, 256, replace(FULL.training, local_steps=2))


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Held-out perplexity of every arm, and its ratio to that of the learned residents."""
    settings = QUICK if quick else FULL
    model = bootstrapped(model_path("mix7M", quick=quick), settings.experts, settings.calibration_tokens)
    runs = [(budget, seed) for budget, seeds in settings.budgets.items() for seed in seeds]
    found: dict[int, list[dict]] = {budget: [] for budget in settings.budgets}
    for done, (budget, seed) in enumerate(runs):
        clients = [
            compare_arms(model, *client_text(source, settings, seed, quick), budget, seed, settings.training)
            for source in data_sources(settings.domains, quick=quick)
        ]
        found[budget].append({"seed": seed, "clients": dict(zip(settings.domains, clients, strict=True))})
        on_step("seeds and budgets", done + 1, len(runs))
    quarter = {arm: interval(ratios(found[min(found)], arm)) for arm in ARMS[1:]}
    config = RunConfig()
    return Measured(
        figures={
            "ppl_random_over_learned": quarter["random"][0],
            "ppl_usage_over_learned": quarter["usage"][0],
        },
        peers={
            "intervals": {
                f"budget {budget}": {arm: interval(ratios(seeds, arm)) for arm in ARMS[1:]}
                for budget, seeds in found.items()
            },
            "runs": {f"budget {budget}": seeds for budget, seeds in found.items()},
            "assembler_steps": config.assembler_steps,
            "assembler_learning_rate": config.assembler_learning_rate,
            "lookahead_steps": config.lookahead_steps,
            "local_steps": settings.training.local_steps,
        },
        notes={
            f"ppl_{arm}_over_learned": "geometric mean over clients, lower end of the 95 % interval over seeds"
            for arm in ("random", "usage")
        },
    )


def ratios(seeds: Sequence[dict], arm: str) -> list[float]:
    """Perplexity of ``arm`` over that of the learned residents: per seed, the geometric mean over clients."""
    return [
        math.exp(
            fmean(
                math.log(client[arm]["after"] / client["learned"]["after"])
                for client in each["clients"].values()
            )
        )
        for each in seeds
    ]


def client_text(source: str, settings: Settings, seed: int, quick: bool) -> tuple[Blocks, Blocks]:
    """Training and held-out blocks of a client; the order of training documents is drawn with ``seed``."""
    path, size = model_path("mix7M", quick=quick), settings.block_size
    train = domain_blocks(source, path, block_size=size, max_blocks=settings.train_blocks, seed=seed)
    valid = domain_blocks(source, path, split="valid", block_size=size, max_blocks=settings.valid_blocks)
    return train, valid


def compare_arms(
    model: FedGraftForCausalLM, train: Blocks, valid: Blocks, budget: int, seed: int, training: LocalTraining
) -> dict[str, dict[str, float]]:
    """Held-out perplexity of one client before and after local training, by arm."""
    masks = choose_masks(model, train, budget, seed, training)
    found = {}
    for arm in ARMS:
        more = RunConfig().assembler_steps if arm == ARMS[-1] else 0
        client = copy.deepcopy(model)
        set_residents(client, masks[arm.partition(",")[0]])
        with visiting(client, scaled_visits(client, budget)):
            before = evaluate_loss(client, valid.input_ids, valid.labels).perplexity
            stream = batches(train, _BATCH, generator=torch.Generator().manual_seed(seed))
            train_locally(client, stream, replace(training, local_steps=training.local_steps + more))
            after = evaluate_loss(client, valid.input_ids, valid.labels).perplexity
        found[arm] = {"before": before, "after": after}
    return found


def choose_masks(
    model: FedGraftForCausalLM, train: Blocks, budget: int, seed: int, training: LocalTraining
) -> dict[str, list[Tensor]]:
    """Residents of a client by each rule, per layer bool ``[E]``."""
    layers, generator = model.expert_layers(), torch.Generator().manual_seed(seed + 1)
    set_residents(model, [None] * len(layers))
    torch.manual_seed(seed)
    learned, used = assemble(
        Assembler([layer.num_experts for layer in layers]),
        model,
        train,
        batches(train, _BATCH, generator=generator),
        budget=budget,
        visits=scaled_visits(model, budget),
        config=RunConfig(),
        training=training,
    )
    set_residents(model, [None] * len(layers))
    scores = [torch.rand(layer.num_experts, generator=generator) for layer in layers]
    return {
        "learned": learned,
        "usage": used,
        "random": [choose_residents(scores_E, budget) for scores_E in scores],
    }


if __name__ == "__main__":
    run_benchmark("assembler", measure)
