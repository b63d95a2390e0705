from __future__ import annotations

from types import SimpleNamespace

import pytest

from configs.conflicts import check_conflicts
from configs.errors import UserError
from configs.schema import RunConfig, load_run_config
from configs.values import read_config_file
from tests.support.paths import ROOT

SHARED = {"entry_score": "shared", "density_scope": "expert"}
PRIVATE = SHARED | {
    "dp_clip_norm": 1.0,
    "dp_noise_multiplier": 2.0,
    "combine": "mean",
    "client_weight": "uniform",
    "clip_norm_multiple": 0.0,
    "keep_best": False,
    "drift_loss": 0.0,
    "drift_routing": 0.0,
    "rho_max": 0,
}


def config_of(**changes) -> SimpleNamespace:
    """A configuration that was never checked: the defaults of a run with ``changes``."""
    run = RunConfig()
    fields = {name: getattr(run, name) for name in (*RunConfig.model_fields, "sources", "total_steps")}
    return SimpleNamespace(**{**fields, "client_budgets": run.client_budgets, **changes})


def test_the_defaults_agree_with_each_other():
    check_conflicts(config_of())


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"sources": ()}, ["data"]),
        ({"out": "runs/x", "log_dir": "runs/x"}, ["out", "log-dir", "runs/x"]),
        ({"out": "runs", "log_dir": "runs/x"}, ["out", "log-dir", "runs/x"]),
        ({"out": "graph", "graph": "./graph"}, ["out", "graph"]),
        ({"out": "dense", "base": "dense"}, ["out", "base"]),
        ({"budgets": "1,2,3"}, ["budgets", "num-clients"]),
        ({"budgets": "1,2", "memory_budget_mb": 9}, ["budgets", "memory-budget-mb"]),
        ({"client_budgets": (4, 2), "ship_experts": 3}, ["ship-experts", "smallest client budget 2"]),
        (
            {"client_budgets": (0, 2), "experts_per_token": 3},
            ["experts-per-token", "smallest client budget 2"],
        ),
        ({"warmup_steps": 60, "total_steps": 60}, ["warmup-steps", "num-rounds", "local-steps"]),
        ({"train": "experts", "z_loss_weight": 0.1}, ["train", "z-loss-weight"]),
        ({"train": "routing", "lora_rank": 1}, ["train", "lora-rank"]),
        ({"weights": "nf4"}, ["lora-rank", "weights nf4"]),
        ({"attention_lora": True}, ["lora-rank", "attention-lora"]),
        ({"sampling_weights": "examples"}, ["fraction-train", "sampling-weights examples"]),
        ({"min_clients": 3}, ["min-clients", "num-clients"]),
        ({"round_deadline": 601.0}, ["round-deadline", "reply-timeout"]),
        ({"low_rank": True, "upload_budget_mb": 1.0}, ["low-rank", "upload-budget-mb"]),
        ({"low_rank": True, "selection": "sample"}, ["low-rank", "selection=sample"]),
        ({"entry_score": "shared"}, ["density-scope=expert with entry-score=shared, got all"]),
        (SHARED | {"upload_budget_mb": 1.0}, ["upload-budget-mb=0 with entry-score=shared, got 1"]),
        (SHARED | {"low_rank": True}, ["low-rank=false with entry-score=shared, got true"]),
        ({"dp_noise_multiplier": 1.0}, ["dp-clip-norm above 0 with dp-noise-multiplier"]),
        ({"dp_usage_noise": 1.0}, ["dp-clip-norm above 0 with dp-usage-noise"]),
        ({"dp_epsilon": 8.0}, ["dp-clip-norm above 0 with dp-epsilon"]),
        (
            {"dp_clip_norm": 1.0},
            [
                "entry-score=shared, combine=mean, client-weight=uniform, clip-norm-multiple=0, keep-best=false, "
                "drift-loss=0, drift-routing=0 with dp-clip-norm, "
                "got saliency, entrywise, examples, 2, true, 0.2, 0.02;",
            ],
        ),
        (PRIVATE | {"combine": "hajek"}, ["combine=mean with dp-clip-norm, got hajek"]),
        (PRIVATE | {"client_weight": "tokens"}, ["client-weight=uniform with dp-clip-norm, got tokens"]),
        (PRIVATE | {"clip_unit_multiple": 2.0}, ["clip-unit-multiple=0 with dp-clip-norm, got 2"]),
        (PRIVATE | {"opposition_limit": 0.1}, ["opposition-limit=0 with dp-clip-norm, got 0.1"]),
        (PRIVATE | {"max_spawned": 2}, ["max-spawned=0 with dp-clip-norm, got 2"]),
        (PRIVATE | {"early_stop_rounds": 3}, ["early-stop-rounds=0 with dp-clip-norm, got 3"]),
        (PRIVATE | {"early_stop_loss": 2.5}, ["early-stop-loss=0 with dp-clip-norm, got 2.5"]),
        (
            PRIVATE | {"sampling_weights": "examples", "fraction_train": 0.5},
            ["sampling-weights to be uniform or staleness with dp-clip-norm, got examples"],
        ),
        (PRIVATE | {"over_provision": 1.5}, ["over-provision=1 with dp-clip-norm, got 1.5"]),
        (PRIVATE | {"rho_max": 2}, ["dp-usage-noise above 0 with dp-clip-norm and rho-max 2"]),
        (
            PRIVATE | {"dp_noise_multiplier": 0.0, "dp_usage_noise": 1.0},
            ["dp-noise-multiplier", "dp-usage-noise"],
        ),
        (PRIVATE | {"dp_noise_multiplier": 0.0, "dp_epsilon": 1.0}, ["dp-noise-multiplier", "dp-epsilon"]),
        (PRIVATE | {"num_clients": 10, "dp_delta": 0.1}, ["dp-delta below 1 / num-clients = 0.1, got 0.1"]),
    ],
)
def test_each_conflict_names_its_keys(changes, keys):
    with pytest.raises(UserError) as caught:
        check_conflicts(config_of(**changes))
    assert all(key in str(caught.value) for key in keys) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"client_budgets": (0, 0), "ship_experts": 64},
        {"warmup_steps": 59, "total_steps": 60},
        {"train": "experts", "lora_rank": 4, "weights": "nf4", "attention_lora": True},
        {"low_rank": True},
        {"out": "runs/x/out", "log_dir": "runs/x", "graph": "graph"},
        {"sampling_weights": "staleness", "fraction_train": 0.9, "min_clients": 2, "round_deadline": 600.0},
        SHARED,
        PRIVATE,
        PRIVATE | {"sampling_weights": "staleness", "fraction_train": 0.5},
        PRIVATE | {"dp_noise_multiplier": 0.0},
        PRIVATE | {"rho_max": 2, "dp_usage_noise": 4.0, "dp_epsilon": 8.0},
        PRIVATE | {"num_clients": 10, "dp_delta": 0.0999},
    ],
)
def test_what_stops_short_of_a_conflict_is_allowed(changes):
    check_conflicts(config_of(**changes))


def test_the_example_of_a_private_run_is_free_of_conflicts():
    config = load_run_config(read_config_file(ROOT / "configs" / "private.toml"))
    assert config.privacy.on and config.privacy.dp_noise_multiplier > 0
