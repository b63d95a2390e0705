"""Plain averaging of whatever parameters train, at its true bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.support.federated_methods import Client, Schedule, Traffic, held_out_losses
from clients.training.optimizer import make_optimizer, make_schedule
from federated.protocol.messages import message_bytes
from models.runtime.perplexity import LossSum


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
        optimizer = make_optimizer(
            parameters,
            name=training.optimizer,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            momentum=training.momentum,
        )
        learning_rate = make_schedule(
            optimizer,
            name=training.schedule,
            warmup_steps=training.warmup_steps,
            first_step=training.first_step,
            total_steps=training.total_steps,
        )
        self.model.train()
        for _ in range(training.local_steps):
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
