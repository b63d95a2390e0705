"""Typed parts of a run configuration: each holds the keys that one kind of consumer reads.

A view has neither defaults nor documentation of its own: both stand at the key of the same name in
``configs.schema.RunConfig``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

Selection = Literal["top", "sample"]
Combine = Literal["entrywise", "hajek", "horvitz-thompson", "mean", "trimmed-mean", "median"]
ClientWeight = Literal["examples", "tokens", "uniform"]
DensityScope = Literal["expert", "all"]
EntryScore = Literal["saliency", "magnitude", "shared"]
ValueBits = Literal[16, 8, 4, 2]
Trained = Literal["all", "experts", "routing"]
Weights = Literal["fp32", "bf16", "nf4"]
OptimizerName = Literal["adamw", "adafactor", "sgd"]
ScheduleName = Literal["constant", "linear", "cosine"]

_BYTES_PER_MB = 10**6


@dataclass(frozen=True)
class Training:
    """Keys of local training."""

    train: Trained
    local_steps: int
    accumulation_steps: int
    optimizer: OptimizerName
    learning_rate: float
    gain_learning_rate: float
    momentum: float
    weight_decay: float
    schedule: ScheduleName
    warmup_steps: int
    max_grad_norm: float
    gradient_checkpointing: bool
    load_balance_weight: float
    z_loss_weight: float


@dataclass(frozen=True)
class Adapters:
    """Keys of the storage of a client's experts and of their LoRA factors."""

    weights: Weights
    lora_rank: int
    lora_alpha: float
    attention_lora: bool


@dataclass(frozen=True)
class Upload:
    """Keys of the selection, error feedback and coding of a client's update."""

    selection: Selection
    combine: Combine
    ship_experts: int
    density: float
    density_scope: DensityScope
    entry_score: EntryScore
    low_rank: bool
    upload_budget_mb: float
    value_bits: ValueBits
    residual_decay: float

    @property
    def max_bytes(self) -> int:
        """Byte budget of the packed update, in place of ``density``; 0: ``density`` applies."""
        return int(self.upload_budget_mb * _BYTES_PER_MB)

    @property
    def unbiased(self) -> bool:
        """Whether the server weights drawn experts by inverse inclusion probability."""
        return self.combine == "horvitz-thompson"


@dataclass(frozen=True)
class Aggregation:
    """Keys of the server's combination of client updates."""

    combine: Combine
    client_weight: ClientWeight
    server_learning_rate: float
    clip_norm_multiple: float
    clip_unit_multiple: float
    trim_share: float
    opposition_limit: float


@dataclass(frozen=True)
class Rewiring:
    """Keys of the server's graph edits."""

    rho_max: int
    merge_every: int
    merge_max_drift: float
    edit_rest: int
    max_spawned: int
    retire_below: float


@dataclass(frozen=True)
class DriftDetection:
    """Keys of the detection of a change in the clients' text."""

    drift_loss: float
    drift_routing: float


@dataclass(frozen=True)
class Privacy:
    """Keys of client-level differential privacy."""

    dp_clip_norm: float
    dp_noise_multiplier: float
    dp_usage_noise: float
    dp_delta: float
    dp_epsilon: float

    @property
    def on(self) -> bool:
        """Whether updates are combined by the Gaussian mechanism and clients report no losses."""
        return self.dp_clip_norm > 0

    @property
    def counts_usage(self) -> bool:
        """Whether clients report usage counts: without noise on them, only in runs without differential privacy."""
        return not self.on or self.dp_usage_noise > 0


@dataclass(frozen=True)
class Participation:
    """Keys of the choice of clients in a round, and of how long the server waits for them."""

    fraction_train: float
    sampling_weights: str
    weight_cap: float
    min_clients: int
    over_provision: float
    round_deadline: float
    reply_timeout: float

    def wanted(self, connected: int) -> int:
        """Updates that enter a round with so many connected clients: at least one, at most one of each client."""
        share = math.ceil(self.fraction_train * connected)
        return max(1, min(connected, max(self.min_clients, share)))

    @property
    def quorum(self) -> int:
        """Usable updates that a round needs."""
        return max(1, self.min_clients)


View = TypeVar(
    "View", Training, Adapters, Upload, Aggregation, Rewiring, DriftDetection, Privacy, Participation
)


def view_of(kind: type[View], config: Any) -> View:
    """The keys of ``kind`` read from a run configuration."""
    return kind(**{field.name: getattr(config, field.name) for field in fields(kind)})


class Views:
    """The views of a run configuration, as properties for ``configs.schema.RunConfig``."""

    @property
    def training(self) -> Training:
        """Keys of local training."""
        return view_of(Training, self)

    @property
    def adapters(self) -> Adapters:
        """Keys of the storage of experts and of LoRA factors."""
        return view_of(Adapters, self)

    @property
    def upload(self) -> Upload:
        """Keys of the selection, error feedback and coding of a client's update."""
        return view_of(Upload, self)

    @property
    def aggregation(self) -> Aggregation:
        """Keys of the server's combination of client updates."""
        return view_of(Aggregation, self)

    @property
    def participation(self) -> Participation:
        """Keys of the choice of clients in a round."""
        return view_of(Participation, self)

    @property
    def drift_detection(self) -> DriftDetection:
        """Keys of the detection of a change in the clients' text."""
        return view_of(DriftDetection, self)

    @property
    def privacy(self) -> Privacy:
        """Keys of client-level differential privacy."""
        return view_of(Privacy, self)

    @property
    def rewiring(self) -> Rewiring:
        """Keys of the server's graph edits."""
        return view_of(Rewiring, self)
