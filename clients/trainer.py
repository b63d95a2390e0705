"""Local training of the experts that a client holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from configs.errors import UserError
from models.modeling_fedgraft import FedGraftForCausalLM
from models.settings import residents
from models.units import Unit, read_unit, unit_sizes, write_unit


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains in a round.

    Attributes:
        steps: optimizer steps.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        max_grad_norm: 0 for no clipping.
        autocast: run matrix products in bf16.
    """

    steps: int
    learning_rate: float
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    autocast: bool = True


@dataclass(frozen=True)
class LocalResult:
    """What local training gave.

    Attributes:
        deltas: change of each resident unit, fp32 ``[size]``.
        losses: loss of each step, nats per token.
        tokens: labelled tokens trained on.
    """

    deltas: dict[Unit, Tensor]
    losses: list[float]
    tokens: int


def train_locally(
    model: FedGraftForCausalLM, batches: Iterator[tuple[Tensor, Tensor]], training: LocalTraining
) -> LocalResult:
    """Train the experts, routers and gains of ``model`` in place; attention, norms and embeddings stay fixed.

    Args:
        model: fp32 weights, residency set.
        batches: endless ``(input_ids, labels)``, each ``[B, S]``.
        training: how.

    Raises:
        UserError: the loss or the router scores are not finite.
    """
    before = {unit: read_unit(model, unit) for unit in resident_units(model)}
    # Weight decay reaches whole tensors, so what the client does not hold is put back afterwards.
    decayed = set(unit_sizes(model)) - set(before) if training.weight_decay else set()
    others = {unit: read_unit(model, unit) for unit in decayed}
    parameters = expert_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    losses, tokens = [], 0
    model.train()
    for _ in range(training.steps):
        input_ids, labels = next(batches)
        losses.append(_step(model, optimizer, parameters, input_ids, labels, training))
        tokens += int((labels[:, 1:] != -100).sum())
    model.eval()
    for unit, vector in others.items():
        write_unit(model, unit, vector)
    deltas = {unit: read_unit(model, unit) - start for unit, start in before.items()}
    return LocalResult(deltas, losses, tokens)


def resident_units(model: FedGraftForCausalLM) -> list[Unit]:
    """The units that the model's residency lets it train, in order."""
    return [
        (index, int(expert))
        for index, held in enumerate(residents(model))
        for expert in held.nonzero().flatten()
    ]


def expert_parameters(model: FedGraftForCausalLM) -> list[nn.Parameter]:
    """The parameters of the expert graphs; all others are frozen by this call."""
    model.requires_grad_(False)
    parameters = [parameter for layer in model.expert_layers() for parameter in layer.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def _step(
    model: FedGraftForCausalLM,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    input_ids: Tensor,
    labels: Tensor,
    training: LocalTraining,
) -> float:
    try:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=training.autocast):
            loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
    except FloatingPointError as error:
        raise UserError(
            f"expected finite router scores in training, got others ({error}); lower learning-rate"
        ) from error
    value = float(loss.detach())
    if not value < float("inf"):
        raise UserError(f"expected a finite training loss, got {value}; lower learning-rate")
    optimizer.zero_grad()
    loss.backward()
    if training.max_grad_norm > 0:
        nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
    optimizer.step()
    return value
