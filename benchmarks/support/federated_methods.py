"""Clients, training schedule and traffic that all federated baselines share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from clients.data_stream import BATCH_ORDER, round_generator
from clients.training.trainer import LocalTraining
from federated.data.blocks import Blocks, batches
from models.runtime.perplexity import LossSum, evaluate_loss


@dataclass(frozen=True)
class Client:
    """One client of a federation.

    Attributes:
        name: unique name.
        partition: index, from 0.
        train: training blocks.
        valid: held-out blocks.
    """

    name: str
    partition: int
    train: Blocks
    valid: Blocks


@dataclass(frozen=True)
class Traffic:
    """Serialized bytes of the Flower messages of one round, summed over clients: uplink and downlink."""

    up: int
    down: int


class Method(Protocol):
    """Federated method that trains one global model round by round."""

    def train_round(self, server_round: int) -> Traffic:
        """Train on every client, aggregate the changes, and apply them to the global model."""
        ...

    def losses(self) -> dict[str, LossSum]:
        """Loss of the global model on the held-out blocks of each client."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Local training over all rounds, with the batches that ``clients.participant`` draws.

    Attributes:
        training: local training of one round; its learning-rate schedule spans all rounds.
        rounds: number of rounds.
        batch_size: blocks per batch.
        seed: seed of the run.
    """

    training: LocalTraining
    rounds: int
    batch_size: int
    seed: int

    def at(self, server_round: int) -> LocalTraining:
        """Local training of one round, counted from 1."""
        steps = self.training.local_steps
        return replace(
            self.training,
            first_step=(server_round - 1) * steps,
            total_steps=self.rounds * steps,
        )

    def stream(self, client: Client, server_round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless training batches of a client in a round, the same for every method."""
        generator = round_generator(self.seed, server_round, client.partition, purpose=BATCH_ORDER)
        return batches(client.train, self.batch_size, generator=generator)


def held_out_losses(
    model: PreTrainedModel, clients: Sequence[Client], *, autocast: bool
) -> dict[str, LossSum]:
    """Loss of ``model`` on the held-out blocks of each client."""
    return {
        client.name: evaluate_loss(model, client.valid.input_ids, client.valid.labels, autocast=autocast)
        for client in clients
    }
