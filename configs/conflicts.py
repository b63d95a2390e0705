"""Checks for conflicting keys of a run configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.choices import SamplingWeights
from configs.errors import UserError
from configs.values import parse_budgets

# Values of keys that differential privacy requires: bounded sensitivity, and nothing released that depends on data
# without noise. Another entry draw, weight, combination or clipping depends on what clients send; early stopping, the
# best model, drift and growth read their losses, and over-provisioning lets one client take the place of another.
_PRIVATE: dict[str, str | float | bool] = {
    "entry_score": "shared",
    "combine": "mean",
    "client_weight": "uniform",
    "clip_norm_multiple": 0.0,
    "clip_unit_multiple": 0.0,
    "opposition_limit": 0.0,
    "early_stop_rounds": 0,
    "early_stop_loss": 0.0,
    "keep_best": False,
    "drift_loss": 0.0,
    "drift_routing": 0.0,
    "max_spawned": 0,
    "over_provision": 1.0,
}
# Values of keys without which clients cannot ship the same entries.
_SHARED: dict[str, str | float | bool] = {
    "density_scope": "expert",
    "upload_budget_mb": 0.0,
    "low_rank": False,
}


def check_conflicts(config: Any) -> None:
    """Refuse a configuration whose keys contradict each other.

    Args:
        config: a ``configs.schema.RunConfig``, which calls this when it is built.

    Raises:
        UserError: names the keys, and which of them to change.
    """
    if not config.sources:
        raise UserError("expected data to name at least one source, got none; set data to e.g. 'wikimix'")
    _check_folders(config)
    _check_budgets(config)
    _check_training(config)
    _check_lora(config)
    _check_shipment(config)
    _check_participation(config)
    _check_privacy(config)


def _check_folders(config: Any) -> None:
    """Check that the model at the end of the run replaces neither its logs nor the model that it started from."""
    for key, value in (("log-dir", config.log_dir), ("graph", config.graph), ("base", config.base)):
        if config.out and value and Path(value).resolve().is_relative_to(Path(config.out).resolve()):
            raise UserError(
                f"expected out to be another folder than {key}, got {config.out}, which is or holds {value}; name "
                "another"
            )


def _check_participation(config: Any) -> None:
    if config.min_clients > config.num_clients:
        raise UserError(
            f"expected min-clients to be at most the {config.num_clients} clients of num-clients, got "
            f"{config.min_clients}"
        )
    if config.sampling_weights != SamplingWeights.UNIFORM and config.fraction_train == 1:
        raise UserError(
            f"expected fraction-train below 1 with sampling-weights {config.sampling_weights}, got 1; all clients are "
            "asked then"
        )
    if config.round_deadline > config.reply_timeout:
        raise UserError(
            f"expected round-deadline to be at most the {config.reply_timeout:g} s of reply-timeout, got "
            f"{config.round_deadline:g}"
        )


def _check_budgets(config: Any) -> None:
    given = parse_budgets(config.budgets)
    if given and len(given) != config.num_clients:
        raise UserError(
            f"expected budgets to hold one number per client (num-clients is {config.num_clients}), "
            f"got {len(given)}: {config.budgets!r}"
        )
    sized = {
        "budgets": given,
        "expert-budget": config.expert_budget,
        "memory-budget-mb": config.memory_budget_mb,
    }
    set_keys = [key for key, value in sized.items() if value]
    if len(set_keys) > 1:
        raise UserError(f"expected either {' or '.join(set_keys)}, got both; drop one of them")
    smallest = min((budget for budget in config.client_budgets if budget), default=None)
    for key, value in (
        ("ship-experts", config.ship_experts),
        ("experts-per-token", config.experts_per_token),
    ):
        if smallest is not None and value > smallest:
            raise UserError(
                f"expected {key} to be at most the smallest client budget {smallest}, got {value}"
            )


def _check_training(config: Any) -> None:
    if config.warmup_steps and config.warmup_steps >= config.total_steps:
        raise UserError(
            f"expected warmup-steps to be below the run's {config.total_steps} optimizer steps "
            f"(num-rounds x local-steps), got {config.warmup_steps}"
        )
    if config.train == "experts" and (config.load_balance_weight or config.z_loss_weight):
        raise UserError(
            "expected train to be all or routing with load-balance-weight or z-loss-weight, got experts; "
            "these losses train routers"
        )


def _check_lora(config: Any) -> None:
    if config.lora_rank:
        if config.train == "routing":
            raise UserError(
                "expected train to be all or experts with lora-rank, got routing; set lora-rank to 0"
            )
        return
    if config.weights != "fp32":
        raise UserError(
            f"expected lora-rank above 0 with weights {config.weights}, got 0; such weights are fixed"
        )
    if config.attention_lora:
        raise UserError(
            "expected lora-rank above 0 with attention-lora, got 0; attention trains through factors only"
        )


def _check_shipment(config: Any) -> None:
    if config.low_rank and (config.upload_budget_mb or config.selection == "sample"):
        other = "upload-budget-mb" if config.upload_budget_mb else "selection=sample"
        raise UserError(f"expected low-rank without {other}, got both; drop one of them")
    if config.entry_score == "shared":
        _require(config, _SHARED, "entry-score=shared")


def _check_privacy(config: Any) -> None:
    if not config.dp_clip_norm:
        for key in ("dp_noise_multiplier", "dp_usage_noise", "dp_epsilon"):
            if getattr(config, key):
                raise UserError(
                    f"expected dp-clip-norm above 0 with {_hyphenated(key)}, got 0; set the bound of the noise"
                )
        return
    _require(config, _PRIVATE, "dp-clip-norm")
    if config.sampling_weights == SamplingWeights.EXAMPLES:
        raise UserError(
            f"expected sampling-weights to be {SamplingWeights.UNIFORM} or {SamplingWeights.STALENESS} with "
            f"dp-clip-norm, got {SamplingWeights.EXAMPLES}; numbers of examples are private"
        )
    if config.rho_max and not config.dp_usage_noise:
        raise UserError(
            f"expected dp-usage-noise above 0 with dp-clip-norm and rho-max {config.rho_max}, got 0; graph edits "
            "disclose usage, so set the noise on it or rho-max to 0"
        )
    if config.dp_usage_noise and not config.dp_noise_multiplier:
        raise UserError("expected dp-noise-multiplier above 0 with dp-usage-noise, got 0; set both")
    if config.dp_epsilon and not config.dp_noise_multiplier:
        raise UserError("expected dp-noise-multiplier above 0 with dp-epsilon, got 0; set the noise")
    if config.dp_delta * config.num_clients >= 1:
        raise UserError(
            f"expected dp-delta below 1 / num-clients = {1 / config.num_clients:g}, got {config.dp_delta:g}; a "
            "mechanism that discloses one client completely would satisfy it"
        )


def _require(config: Any, values: Mapping[str, str | float | bool], by: str) -> None:
    """Refuse a configuration in which a key has another value than ``values`` names for it."""
    wrong = [key for key, value in values.items() if getattr(config, key) != value]
    if wrong:
        expected = ", ".join(f"{_hyphenated(key)}={_text(values[key])}" for key in wrong)
        got = ", ".join(_text(getattr(config, key)) for key in wrong)
        raise UserError(f"expected {expected} with {by}, got {got}; set these keys")


def _hyphenated(key: str) -> str:
    return key.replace("_", "-")


def _text(value: str | float | bool) -> str:
    """A value as in ``key=value``."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else f"{value:g}"
