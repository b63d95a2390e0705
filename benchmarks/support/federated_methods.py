"""What all ways to train clients together share: who the clients are, how they train, what is counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clients.training.trainer import LocalTraining
from federated.data.blocks import Blocks, batches
from models.runtime.perplexity import LossSum, evaluate_loss


@dataclass(frozen=True)
class Client:
    """One client: its name, its training blocks and its held-out blocks."""

    name: str
    train: Blocks
    valid: Blocks


@dataclass(frozen=True)
class Traffic:
    """Bytes of one round as Flower serializes them, over all clients: to the server, and back."""

    up: int
    down: int


class Method(Protocol):
    """A federation that trains one global model, round by round."""

    def train_round(self, server_round: int) -> Traffic:
        """Train on every client, aggregate, and move the global model."""
        ...

    def losses(self) -> dict[str, LossSum]:
        """Loss of the global model on each client's held-out blocks."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Local training, the same for all methods.

    Attributes:
        training: of a client in a round; its schedule spans all rounds.
        rounds: of the run.
        batch_size: blocks.
        seed: of the order of each client's blocks.
    """

    training: LocalTraining
    rounds: int
    batch_size: int
    seed: int

    def at(self, server_round: int) -> LocalTraining:
        """How a client trains in a round, counted from 1."""
        steps = self.training.local_steps
        return replace(
            self.training,
            first_step=(server_round - 1) * steps,
            total_steps=self.rounds * steps,
        )

    def stream(self, client: Client, server_round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of a client in a round, equal for every method."""
        seed = hash((self.seed, server_round, len(client.name), *client.name.encode())) % 2**31
        return batches(client.train, self.batch_size, generator=torch.Generator().manual_seed(seed))


def held_out_losses(
    model: PreTrainedModel, clients: Sequence[Client], *, autocast: bool
) -> dict[str, LossSum]:
    """Loss of ``model`` on the held-out blocks of each client."""
    return {
        client.name: evaluate_loss(model, client.valid.input_ids, client.valid.labels, autocast=autocast)
        for client in clients
    }
