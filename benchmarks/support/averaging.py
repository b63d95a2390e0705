"""Federated averaging of dense parameter changes in bf16, with the bytes of its Flower messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.support.federated_methods import Client, Schedule, Traffic, held_out_losses
from clients.training.trainer import train_groups
from federated.protocol.messages import message_bytes
from models.runtime.perplexity import LossSum


class Averaging:
    """FedAvg (McMahan et al., 2017, arXiv:1602.05629) with the dense bf16 change of every trained parameter.

    With FFN matrices this is dense FedAvg, with LoRA factors FedIT (Zhang et al., 2023, arXiv:2305.05644).

    Args:
        model: global model, fp32.
        parameters: trained parameters of ``model`` by name; all others are frozen.
        clients: participants of every round.
        schedule: local training of the clients.
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
        """Train the parameters on every client, and add the mean of the changes, weighted by training blocks."""
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
        """Loss of the global model on the held-out blocks of each client."""
        return held_out_losses(self.model, self._clients, autocast=self._schedule.training.autocast)

    def _train(self, client: Client, server_round: int) -> None:
        training = self._schedule.at(server_round)
        group = {"params": list(self._parameters.values()), "lr": training.learning_rate}
        train_groups(self.model, [group], self._schedule.stream(client, server_round), training)

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
