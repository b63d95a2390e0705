"""Local training of the experts that a client holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from clients.training.gradient_rms import second_moments
from clients.training.optimizer import make_optimizer, make_schedule
from configs.errors import UserError
from configs.run_views import Trained, Training
from models.graph.router_losses import Routing, collect_routing, router_loss
from models.graph.runtime_settings import checkpointing
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

MATRICES = ("gate_up_proj", "down_proj")
# Parameters that start at zero and scale outputs; they take a larger learning rate than weights.
GAINS = ("edge_gain", "output_gain")

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LocalTraining(Training):
    """Local training of one round: the keys of the run, and the place of the round in it.

    Attributes:
        autocast: run matrix products in bf16.
        first_step: optimizer steps of the run before these.
        total_steps: optimizer steps of the run, over which the learning rate is scheduled; 0: it ends with these.
        keep_moments: return the second moments of the gradients, which AdamW holds in memory already.
    """

    autocast: bool
    first_step: int = 0
    total_steps: int = 0
    keep_moments: bool = False

    @classmethod
    def of(cls, keys: Training, **round_facts: Any) -> LocalTraining:
        """Local training with the ``keys`` of a run (``RunConfig.training``) and the attributes of this class."""
        return cls(**vars(keys), **round_facts)


@dataclass(frozen=True)
class LocalResult:
    """Result of local training.

    Attributes:
        losses: loss of each step without router losses, nats per token.
        tokens: labeled tokens trained on.
        moments: second moments of the gradients (``gradient_rms.second_moments``); empty unless they are kept.
    """

    losses: list[float]
    tokens: int
    moments: Mapping[Tensor, Tensor]


def train_locally(
    model: FedGraftForCausalLM, batches: Iterator[Batch], training: LocalTraining
) -> LocalResult:
    """Train experts, routers and gains of ``model``, and its LoRA factors, in place; all other parameters are frozen.

    Default outputs of unvisited experts are among the frozen ones: they stay as the bootstrap fitted them, on every
    client and on the server, and no update carries them. Training them as well lowered the perplexity of a Llama of 7 M
    parameters by less than 1 % in 40 steps.

    Args:
        model: graph with its residents as fused matrices, or as fixed modules with LoRA factors.
        batches: endless ``(input_ids, labels)``, each ``[B, S]``.
        training: options of the round.

    Raises:
        UserError: a loss, gradient norm or router logits that are not finite.
    """
    parameters = expert_parameters(model, training.train)
    groups = _groups(model, parameters, training)
    with _collecting(model, training) as routings, _checkpointing(model, training):
        return train_groups(model, groups, batches, training, routings=routings)


def train_groups(
    model: PreTrainedModel,
    groups: Sequence[Mapping[str, Any]],
    batches: Iterator[Batch],
    training: LocalTraining,
    *,
    routings: list[Routing] | None = None,
) -> LocalResult:
    """Train the parameters of ``groups`` in place for the optimizer steps of one round.

    Args:
        model: any causal language model; put into evaluation mode at the end.
        groups: parameter groups of a torch optimizer, with ``params`` and ``lr``.
        batches: endless ``(input_ids, labels)``, each ``[B, S]``.
        training: optimizer, schedule and number of steps.
        routings: receives the routing of each forward pass, for the router losses; None: there are none.

    Raises:
        UserError: the loss, its gradient or the router scores are not finite.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer, schedule = _optimization([dict(group) for group in groups], training)
    losses, tokens = [], 0
    model.train()
    for _ in range(training.local_steps):
        batch_group = list(islice(batches, training.accumulation_steps))
        count = sum(_predicted(labels) for _, labels in batch_group)
        optimizer.zero_grad()
        losses.append(sum(_backward(model, each, count, routings, training) for each in batch_group))
        _clip(parameters, training.max_grad_norm)
        optimizer.step()
        schedule.step()
        tokens += count
    optimizer.zero_grad()
    model.eval()
    return LocalResult(losses, tokens, second_moments(optimizer) if training.keep_moments else {})


def expert_parameters(model: FedGraftForCausalLM, train: Trained) -> list[nn.Parameter]:
    """Select the trained parameters; all others of the model are frozen.

    LoRA factors, of experts and of attention, train in place of the experts' matrices.

    Args:
        model: model whose ``requires_grad`` flags are set.
        train: ``all``, ``experts`` (all but ``ROUTING``) or ``routing``.
    """
    model.requires_grad_(False)
    named = [item for layer in model.expert_layers() for item in layer.named_parameters()]
    routing = [each for layer in model.expert_layers() for each in layer.routing_parameters().values()]
    matrices = [parameter for name, parameter in named if name in MATRICES]
    factors = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    chosen = {"all": [*(factors or matrices), *routing], "experts": factors or matrices, "routing": routing}
    for parameter in chosen[train]:
        parameter.requires_grad_(True)
    return chosen[train]


def _groups(
    model: FedGraftForCausalLM, parameters: Sequence[nn.Parameter], training: LocalTraining
) -> list[dict[str, Any]]:
    """Parameter groups of gains and of all others, each with its learning rate."""
    gains = {id(getattr(layer, name)) for layer in model.expert_layers() for name in GAINS}
    rate = training.learning_rate
    groups = [
        {"params": [each for each in parameters if id(each) not in gains], "lr": rate},
        {
            "params": [each for each in parameters if id(each) in gains],
            "lr": rate * training.gain_learning_rate,
        },
    ]
    return [group for group in groups if group["params"]]


def _optimization(groups: list[dict[str, Any]], training: LocalTraining) -> tuple[Optimizer, LRScheduler]:
    optimizer = make_optimizer(
        groups,
        name=training.optimizer,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        momentum=training.momentum,
    )
    schedule = make_schedule(
        optimizer,
        name=training.schedule,
        warmup_steps=training.warmup_steps,
        first_step=training.first_step,
        total_steps=training.total_steps or training.first_step + training.local_steps,
    )
    return optimizer, schedule


def _backward(
    model: PreTrainedModel, batch: Batch, count: int, routings: list[Routing] | None, training: LocalTraining
) -> float:
    """Accumulate the gradient of one batch; returns its part of the loss of a step that predicts ``count`` tokens.

    All tokens of a step have equal weight, so that accumulation equals one larger batch.
    """
    loss = _forward(model, batch, count, training.autocast)
    total = loss
    if routings:
        weights = {
            "load_balance_weight": training.load_balance_weight,
            "z_loss_weight": training.z_loss_weight,
        }
        total = loss + router_loss(routings, **weights) / training.accumulation_steps
        routings.clear()
    if not math.isfinite(value := float(total.detach())):
        raise UserError(f"expected a finite training loss, got {value}; lower learning-rate")
    total.backward()
    return float(loss.detach())


def _forward(model: PreTrainedModel, batch: Batch, count: int, autocast: bool) -> Tensor:
    input_ids, labels = (each.to(model.device) for each in batch)
    predicted = torch.tensor(count, device=model.device)
    try:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=autocast):
            out = model(input_ids=input_ids, labels=labels, use_cache=False, num_items_in_batch=predicted)
    except FloatingPointError as error:
        raise UserError(
            f"expected finite router scores in training, got NaN or infinity ({error}); lower learning-rate"
        ) from error
    return out.loss


def _clip(parameters: Sequence[nn.Parameter], max_grad_norm: float) -> None:
    norm = float(nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf))
    if not math.isfinite(norm):
        raise UserError(
            f"expected a finite gradient in training, got one of norm {norm}; lower learning-rate"
        )


def _predicted(labels: Tensor) -> int:
    """Number of predicted tokens: labeled, and not the first of their block."""
    return int((labels[:, 1:] != -100).sum())


def _collecting(model: FedGraftForCausalLM, training: LocalTraining) -> AbstractContextManager[list[Routing]]:
    wanted = training.load_balance_weight or training.z_loss_weight
    return collect_routing(model) if wanted else nullcontext([])


def _checkpointing(model: FedGraftForCausalLM, training: LocalTraining) -> AbstractContextManager[None]:
    return checkpointing(model) if training.gradient_checkpointing else nullcontext()
