"""Ways to train clients together, each with its true bytes: ours, and plain averaging of whatever parameters train."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor, nn
from transformers import PreTrainedModel

from clients.optimiser import make_optimizer, make_schedule
from clients.shipment import limits
from clients.slopes import entry_slopes
from clients.trainer import LocalTraining, train_locally
from configs.schema import RunConfig
from federated.aggregation import Contribution, aggregate
from federated.blocks import Blocks, batches
from federated.codec import pack_update, unpack_update
from federated.entries import magnitude, saliency
from federated.messages import Reply, Request, message_bytes, write_reply, write_request
from federated.selection import choose_update
from models.checkpoint import read_graph
from models.perplexity import LossSum, evaluate_loss
from models.units import Unit, read_unit, unit_sizes
from server.global_model import GlobalModel


@dataclass(frozen=True)
class Client:
    """One client: its name, its training blocks and its held-out blocks."""

    name: str
    train: Blocks
    valid: Blocks


@dataclass(frozen=True)
class Traffic:
    """Bytes of one round as Flower serialises them, over all clients: to the server, and back."""

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
        training: of a client in a round; its learning rate falls to zero over all rounds.
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
        steps = self.training.steps
        return replace(
            self.training,
            schedule="linear",
            first_step=(server_round - 1) * steps,
            total_steps=self.rounds * steps,
        )

    def stream(self, client: Client, server_round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of a client in a round, equal for every method."""
        seed = hash((self.seed, server_round, len(client.name), *client.name.encode())) % 2**31
        return batches(client.train, self.batch_size, generator=torch.Generator().manual_seed(seed))


class Averaging:
    """FedAvg (McMahan et al., 2017, arXiv:1602.05629): clients ship the bf16 change of every parameter that trains.

    With FFN matrices this is dense FedAvg, with LoRA factors FedIT (Zhang et al., 2023, arXiv:2305.05644).

    Args:
        model: the global model, fp32.
        parameters: of ``model``, those that train; all others are frozen.
        clients: all of them take part in each round.
        schedule: of their training.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Mapping[str, nn.Parameter],
        clients: Sequence[Client],
        schedule: Schedule,
    ) -> None:
        self.model, self._parameters, self._clients, self._schedule = model, parameters, clients, schedule
        model.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)

    def train_round(self, server_round: int) -> Traffic:
        start = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        examples, up = sum(len(client.train) for client in self._clients), 0
        for client in self._clients:
            self._write(start)
            self._train(client, server_round)
            change = {name: (p.detach() - start[name]).bfloat16() for name, p in self._parameters.items()}
            up += message_bytes(_dense_message(change))
            for name, value in change.items():
                total[name] += value.float() * (len(client.train) / examples)
        step = {name: value.bfloat16() for name, value in total.items()}
        self._write({name: value + step[name].float() for name, value in start.items()})
        return Traffic(up, message_bytes(_dense_message(step)) * len(self._clients))

    def losses(self) -> dict[str, LossSum]:
        return held_out_losses(self.model, self._clients, autocast=self._schedule.training.autocast)

    def _train(self, client: Client, server_round: int) -> None:
        training, stream = self._schedule.at(server_round), self._schedule.stream(client, server_round)
        parameters = list(self._parameters.values())
        optimizer = make_optimizer(parameters, learning_rate=training.learning_rate)
        learning_rate = make_schedule(
            optimizer,
            name=training.schedule,
            first_step=training.first_step,
            total_steps=training.total_steps,
        )
        self.model.train()
        for _ in range(training.steps):
            input_ids, labels = next(stream)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training.autocast):
                loss = self.model(input_ids=input_ids, labels=labels, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, training.max_grad_norm or math.inf)
            optimizer.step()
            learning_rate.step()

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


class SparseExperts:
    """Ours: sparse quantised changes of experts with error feedback up, the server's own quantised step down.

    Args:
        server: the global model.
        clients: all of them take part in each round.
        schedule: of their training.
        config: how updates are selected, packed and combined.
    """

    def __init__(
        self, server: GlobalModel, clients: Sequence[Client], schedule: Schedule, config: RunConfig
    ) -> None:
        self._server, self._clients, self._schedule, self._config = server, clients, schedule, config
        self._residuals: list[Mapping[Unit, Tensor]] = [{} for _ in clients]

    def train_round(self, server_round: int) -> Traffic:
        replies = [self._answer(index, client, server_round) for index, client in enumerate(self._clients)]
        graph, sizes = self._server.graph, unit_sizes(self._server.model)
        change = aggregate(
            [
                Contribution(
                    reply.numbers["examples"],
                    unpack_update(
                        reply.update, sizes=sizes, graph_version=graph.version, graph_hash=graph.digest()
                    ),
                    {_unit(name): pi for name, pi in (reply.inclusion or {}).items()},
                )
                for reply in replies
            ],
            combine=self._config.combine,
            server_learning_rate=self._config.server_learning_rate,
        )
        self._server.advance(
            change, value_bits=self._config.value_bits, density=self._config.downlink_density
        )
        up = sum(message_bytes(write_reply(reply)) for reply in replies)
        return Traffic(up, self._request_bytes(server_round) * len(self._clients))

    def losses(self) -> dict[str, LossSum]:
        return held_out_losses(self._server.model, self._clients, autocast=self._schedule.training.autocast)

    def _answer(self, index: int, client: Client, server_round: int) -> Reply:
        model = self._server.model
        before = {name: value.clone() for name, value in model.state_dict().items()}
        start = {unit: read_unit(model, unit) for unit in unit_sizes(model)}
        result = train_locally(
            model, self._schedule.stream(client, server_round), self._schedule.at(server_round)
        )
        deltas = {unit: read_unit(model, unit) - vector for unit, vector in start.items()}
        graph = read_graph(model)
        seed = self._schedule.seed * 1000 + server_round * 10 + index
        slopes = entry_slopes(model, result.moments)
        prepared = choose_update(
            deltas,
            self._residuals[index],
            limits(self._config),
            score=saliency(slopes) if self._config.entry_score == "saliency" else magnitude,
            selection=self._config.selection,
            unbiased=self._config.combine == "horvitz-thompson",
            value_bits=self._config.value_bits,
            residual_decay=self._config.residual_decay,
            graph_version=graph.version,
            graph_hash=graph.digest(),
            generator=torch.Generator().manual_seed(seed),
        )
        self._residuals[index] = dict(prepared.residual)
        model.load_state_dict(before)
        return Reply(
            name=client.name,
            partition=index,
            budget=0,
            version=self._server.version,
            graph_hash=graph.digest(),
            numbers={"examples": float(len(client.train)), "train-loss": result.losses[-1]},
            update=pack_update(prepared.update, value_bits=self._config.value_bits),
            residents=[np.ones(count, bool) for count in graph.num_experts],
            inclusion={f"{layer}.{e}": pi for (layer, e), pi in prepared.inclusion.items() if pi < 1},
        )

    def _request_bytes(self, server_round: int) -> int:
        request = Request(
            server_round=server_round,
            version=self._server.version,
            graph_hash=self._server.graph.digest(),
            base_fingerprint=self._server.fingerprint,
            steps=self._server.steps[-1:],
            accepted_round=server_round,
            copy_hash=self._server.copy_hash,
        )
        return message_bytes(write_request(request))


def held_out_losses(
    model: PreTrainedModel, clients: Sequence[Client], *, autocast: bool
) -> dict[str, LossSum]:
    """Loss of ``model`` on the held-out blocks of each client."""
    return {
        client.name: evaluate_loss(model, client.valid.input_ids, client.valid.labels, autocast=autocast)
        for client in clients
    }


def _unit(name: str) -> Unit:
    layer, expert = name.split(".")
    return int(layer), int(expert)


def _dense_message(values: Mapping[str, Tensor]) -> RecordDict:
    arrays = {
        name: Array(
            dtype="bfloat16",
            shape=tuple(value.shape),
            stype="fedgraft.bytes",
            data=value.contiguous().view(torch.int16).numpy().tobytes(),
        )
        for name, value in values.items()
    }
    return RecordDict(
        {
            "arrays": ArrayRecord(arrays),
            "metrics": MetricRecord({"num-examples": 1}),
            "config": ConfigRecord({}),
        }
    )
