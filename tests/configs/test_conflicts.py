from __future__ import annotations

from types import SimpleNamespace

import pytest

from configs.conflicts import check_conflicts
from configs.errors import UserError
from configs.schema import RunConfig


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
        {"sampling_weights": "staleness", "fraction_train": 0.9, "min_clients": 2, "round_deadline": 600.0},
    ],
)
def test_what_stops_short_of_a_conflict_is_allowed(changes):
    check_conflicts(config_of(**changes))
