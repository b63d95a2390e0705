"""Schema of a run configuration: every key with its default, bounds and documentation.

Flower's run configuration carries booleans, integers, floats and strings only, so lists are strings here,
separated by ``,`` (numbers) or ``;`` (data sources), with a property that gives the parsed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from configs.choices import Device, LossOn, SamplingWeights
from configs.conflicts import check_conflicts
from configs.keys import (
    BlockSize,
    Count,
    Density,
    Keys,
    NonNegative,
    Positive,
    Share,
    Value,
    Whole,
    check_known,
    integer_as_text,
    keys_of,
    one_of,
    validate_keys,
)
from configs.run_views import (
    ClientWeight,
    Combine,
    DensityScope,
    EntryScore,
    OptimizerName,
    ScheduleName,
    Selection,
    Trained,
    ValueBits,
    Views,
    Weights,
)
from configs.values import parse_budgets, parse_partition, split_list


class RunConfig(Views, Keys):
    """Configuration of one federated run; immutable, conflicts are refused when it is built."""

    graph: str = ""
    """Path of the bootstrapped checkpoint folder; empty: the user-cache folder."""
    base: str = ""
    """Dense model, path or hub id, from which clients build the graph by the recipe; empty: they have graph."""
    out: str = ""
    """Folder that receives the final checkpoint; empty: none is written."""
    log_dir: str = ""
    """Folder that receives the logs of the run; empty: a new one in the user-cache folder."""
    overwrite: bool = False
    """Whether out and log-dir may exist and hold files already."""
    resume: bool = False
    """Whether the run continues from the state in log-dir, with the settings that it was started with."""
    data: str = "wikimix"
    """Data sources separated by ';': wikimix[:DOMAIN,...], a path or a hub id."""
    partition: str = "domain"
    """Partition of the documents into clients: domain, iid, dirichlet:ALPHA or natural:COLUMN."""
    num_clients: Count = 2
    """Clients (Flower nodes) in the federation."""
    num_rounds: Count = 3
    """Server rounds, each one train and aggregate cycle."""
    budgets: str = ""
    """Experts per layer each client holds, separated by ','; empty: expert-budget."""
    expert_budget: Whole = 0
    """Experts per layer that every client holds and trains; 0: all."""
    memory_budget_mb: Whole = 0
    """MiB that a client's process may occupy while it trains, from which its expert budget follows; 0: no limit."""
    experts_per_token: Whole = 0
    """Experts a token visits per layer; 0: the graph's, by budget."""
    walk: Literal["", "best-first", "depth-first"] = ""
    """Order in which a token visits experts: best-first or depth-first; empty: the graph's own."""
    rho_max: Whole = 4
    """Most graph edits one merge may make; 0: the graph never changes."""
    merge_every: Count = 1
    """Server rounds between two merges, i.e. edits of the graph."""
    merge_max_drift: NonNegative = 0.05
    """Rise of the server's validation loss (nats per token) above which a merge is rolled back."""
    drift_loss: NonNegative = 0.2
    """Rise of a client's held-out loss above its moving average, summed over rounds (nats), that is drift; 0: off."""
    drift_routing: Share = 0.02
    """Divergence of a client's expert visits from their average (Jensen-Shannon, bits) that can be drift; 0: off."""
    edit_rest: Whole = 3
    """Server rounds after an edit of an edge in which it is not edited again; 0: none."""
    max_spawned: Whole = 0
    """Experts that growth may add to a layer where drift is detected; 0: the graph does not grow."""
    retire_below: Share = 0.01
    """Visits of an added expert, as a share of its layer's mean, below which it is retired; 0: none is."""
    checkpoint_every: Whole = 0
    """Server rounds between two checkpoints in log-dir/checkpoints; 0: none but out."""
    keep_checkpoints: Whole = 2
    """Checkpoints that stay in log-dir/checkpoints, the latest ones; 0: all."""
    keep_best: bool = True
    """Whether the model of the lowest held-out loss is written to log-dir/checkpoints/best, beside the last in out."""
    selection: Selection = "top"
    """Experts a client ships: top (most update energy) or sample (known probability)."""
    combine: Combine = "entrywise"
    """Server weighting of updates: entrywise, hajek (whole experts), horvitz-thompson, mean, trimmed-mean or median."""
    client_weight: ClientWeight = "examples"
    """Weight of a client: its training blocks (examples), the tokens it trained on in the round, or 1 (uniform)."""
    weight_cap: NonNegative = 2.0
    """Largest weight of a client as a multiple of the round's median, against false counts; 0: as claimed."""
    ship_experts: Whole = 0
    """Experts per layer a client ships each round; 0: all it trained."""
    density: Density = 0.006
    """Kept entries / all entries of the experts a client ships; a node's own density takes precedence."""
    density_scope: DensityScope = "all"
    """Entries that compete for the density: of each expert by itself, or of all that a client ships (all)."""
    entry_score: EntryScore = "saliency"
    """Score of a shipped entry: saliency (change times root of gradient RMS), magnitude, or shared (a common draw)."""
    low_rank: bool = False
    """Whether an expert's change is sent as low-rank factors where these hold more of its energy in as many bytes."""
    upload_budget_mb: NonNegative = 0.0
    """MB (10^6 bytes) of a client's packed update, in place of density; a node's own takes precedence; 0: none."""
    downlink_density: Density = 1.0
    """Kept entries / all entries of each expert's step that the server sends; 1: every entry that a client shipped."""
    value_bits: ValueBits = 2
    """Bits per shipped value: 16, 8, 4 or 2."""
    residual_decay: Share = 0.5
    """Share of the unshipped residual kept for next round."""
    server_learning_rate: Positive = 2.0
    """Factor on the combined update that the server applies."""
    clip_norm_multiple: NonNegative = 2.0
    """Clip client updates to this multiple of the round's median update norm; 0: off."""
    clip_unit_multiple: NonNegative = 0.0
    """Clip the change of each expert to this multiple of its median norm, with three clients or more; 0: off."""
    trim_share: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    """Share of an entry's values that trimmed-mean leaves out at each end, with three or more; at least one value."""
    opposition_limit: Share = 0.0
    """Leave out an update whose signs oppose most others: agreeing minus opposing share below minus this; 0: none."""
    dp_clip_norm: NonNegative = 0.0
    """L2 norm that a client's update is clipped to for differential privacy (docs/privacy.md); 0: off."""
    dp_noise_multiplier: NonNegative = 0.0
    """Standard deviation of the noise on the sum of updates, as a multiple of dp-clip-norm; 0: no guarantee."""
    dp_usage_noise: NonNegative = 0.0
    """Standard deviation of the noise on the sum of usage counts, of norm 1 for each client; 0: they are not sent."""
    dp_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Delta of the guarantee for which epsilon is reported, below 1 / num-clients."""
    dp_epsilon: NonNegative = 0.0
    """Epsilon that ends the run before the round that would exceed it; 0: no limit."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every random choice in the run."""
    train: Trained = "all"
    """Trained parameters: all, experts (their matrices only) or routing (routers, gains and affinities only)."""
    weights: Weights = "fp32"
    """Precision of a client's experts: fp32, bf16 or nf4 (4-bit QLoRA, attention too); bf16, nf4 need lora-rank."""
    lora_rank: Whole = 0
    """Rank of the LoRA factors that train in place of the experts' matrices; 0: the matrices train."""
    lora_alpha: Positive = 16.0
    """Scale of the LoRA factors' product, times lora-rank."""
    attention_lora: bool = False
    """Whether attention projections train, through LoRA factors of the same rank."""
    local_steps: Count = 20
    """Optimizer steps a client takes per round."""
    batch_size: Count = 8
    """Blocks per batch."""
    accumulation_steps: Count = 1
    """Batches per optimizer step."""
    block_size: BlockSize = 0
    """Tokens per block, at least 2 and at most the model's max_position_embeddings; 0: the smaller of 256 and these."""
    optimizer: OptimizerName = "adamw"
    """Optimizer of the clients: adamw, adafactor (needs the least memory) or sgd."""
    learning_rate: Positive = 5e-4
    """Learning rate of the clients' optimizer."""
    gain_learning_rate: Positive = 1.0
    """Learning rate of edge gains and output gains, as a multiple of learning-rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of sgd; the other optimizers ignore it."""
    weight_decay: NonNegative = 0.0
    """Weight decay of the clients' optimizer, decoupled from the gradient with adamw and adafactor."""
    schedule: ScheduleName = "linear"
    """Learning rate over all rounds: constant, linear or cosine; the latter two fall to 0."""
    warmup_steps: Whole = 0
    """Warm-up steps of the learning rate, counted from the first optimizer step of the run."""
    max_grad_norm: NonNegative = 1.0
    """Gradient norm a step is clipped to; 0: no clipping."""
    gradient_checkpointing: bool = False
    """Whether the backward pass recomputes activations: less memory, more time."""
    load_balance_weight: NonNegative = 0.0
    """Weight of the routers' load-balance loss (Switch Transformer) in the training loss; 0: off."""
    z_loss_weight: NonNegative = 0.0
    """Weight of the routers' z-loss (ST-MoE) in the training loss; 0: off."""
    early_stop_rounds: Whole = 0
    """Rounds without an improvement of the clients' held-out loss after which the run ends; 0: never."""
    early_stop_delta: NonNegative = 0.0
    """Decrease of the held-out loss (nats per token) that counts as an improvement."""
    early_stop_loss: NonNegative = 0.0
    """Held-out loss of the clients (nats per token) at which the run ends; 0: none."""
    assembler_steps: Whole = 8
    """Assembler steps before local training; 0: it is not trained."""
    assembler_learning_rate: Positive = 0.3
    """Learning rate of an expert's own logit in the assembler; its MLP learns at a thirtieth of it."""
    lookahead_steps: Whole = 4
    """Steps of trial training with the assembler's experts and with the most used ones; 0: no trial."""
    usage_decay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Decay of the exponential moving average of usage over rounds."""
    eval_blocks: Whole = 32
    """Held-out blocks evaluated per client; 0: all."""
    train_documents: Count = 2000
    """Training documents generated per wikimix domain."""
    server_data: str = ""
    """Validation text of the server, sources as in data; empty: none."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the clients' matrix products: bf16, fp32, or auto (bf16 where the device is faster with it)."""
    device: Annotated[str, one_of(Device)] = "auto"
    """Device of the clients: cpu, cuda, or auto (CUDA if there is a device)."""
    num_threads: Count = 1
    """Torch threads per client process."""
    template: str = "auto"
    """Prompt template for instruction records: auto, a name in configs/templates or a JSON path."""
    loss_on: Annotated[str, one_of(LossOn)] = "all"
    """Tokens with a loss in training and evaluation: all, or answers (of chats and instruction records)."""
    fraction_train: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the connected clients whose updates enter a round; with another draw in each round."""
    sampling_weights: Annotated[str, one_of(SamplingWeights)] = "uniform"
    """Probability to be drawn: uniform, or proportional to examples or to staleness (rounds since the last request)."""
    min_clients: Whole = 0
    """Usable updates that a round needs; with fewer it is repeated once, then the run ends, saved; 0: one."""
    over_provision: Annotated[float, Field(ge=1)] = 1.0
    """Clients asked in a round, as a multiple of those whose updates are used: the first to answer."""
    round_deadline: NonNegative = 0.0
    """Seconds after which a round goes on with the replies so far, if they are min-clients; 0: reply-timeout."""
    reply_timeout: Positive = 600.0
    """Seconds the server waits for the replies of a round."""
    trace_tokens: Whole = 64
    """Tokens whose expert walks are written to the call trace."""

    @field_validator("budgets", "data", "server_data", mode="before")
    @classmethod
    def _join_lists(cls, value: Any, info: Any) -> Any:
        """Accept a TOML list where the key is a separated string."""
        separator = "," if info.field_name == "budgets" else ";"
        return separator.join(str(item) for item in value) if isinstance(value, list | tuple) else value

    @field_validator(
        "graph", "base", "out", "log_dir", "data", "budgets", "server_data", "template", mode="before"
    )
    @classmethod
    def _integer_as_text(cls, value: Any) -> Any:
        return integer_as_text(value)

    @field_validator("budgets")
    @classmethod
    def _check_budgets(cls, value: str) -> str:
        parse_budgets(value)
        return value

    @field_validator("partition")
    @classmethod
    def _check_partition(cls, value: str) -> str:
        parse_partition(value)
        return value

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> RunConfig:
        check_conflicts(self)
        return self

    @property
    def client_budgets(self) -> tuple[int, ...]:
        """Experts per layer that each client holds, one number a client; 0 = all."""
        return parse_budgets(self.budgets) or (self.expert_budget,) * self.num_clients

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a client that answers in every round."""
        return self.num_rounds * self.local_steps

    @property
    def sources(self) -> tuple[str, ...]:
        """The data sources."""
        return split_list(self.data, ";")

    @property
    def server_sources(self) -> tuple[str, ...]:
        """The sources of the server's validation text; empty when it has none."""
        return split_list(self.server_data, ";")

    def values(self) -> dict[str, Value]:
        """All keys, hyphenated, as Flower's run configuration takes them."""
        return self.model_dump(by_alias=True)


def load_run_config(values: Mapping[str, Any]) -> RunConfig:
    """Validate hyphenated ``values`` over the defaults.

    Raises :class:`UserError` in one line for an unknown key (naming the nearest), a wrong type, a value
    out of range or a conflict between keys.
    """
    check_known(
        values, keys_of(RunConfig), kind="configuration key", listing="configs/default.toml lists all"
    )
    return validate_keys(RunConfig, values)


def run_config_defaults() -> dict[str, Value]:
    """Every key, hyphenated, with its default."""
    return RunConfig().values()
