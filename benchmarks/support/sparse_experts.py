"""Ours, in one process: what clients ship and the server sends is packed, counted and unpacked as on the wire."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.support.federated_methods import Client, Schedule, Traffic, held_out_losses
from clients.shipment import choose_shipment, drawn_with
from clients.training.gradient_rms import entry_gradient_rms
from clients.training.trainer import train_locally
from configs.schema import RunConfig
from federated.aggregation.combine import Contribution, aggregate
from federated.protocol.messages import Reply, Request, message_bytes, write_reply, write_request
from federated.updates.lazy_vectors import LazyVectors
from federated.updates.update import parse_unit
from federated.wire.codec import pack_update, unpack_update
from models.graph.unit_vectors import Unit, read_unit, unit_sizes
from models.runtime.perplexity import LossSum
from server.model.global_model import GlobalModel


class SparseExperts:
    """Ours: sparse quantized changes of experts with error feedback up, the server's own quantized step down.

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
                    partial(
                        unpack_update,
                        reply.update,
                        sizes=sizes,
                        graph_version=graph.version,
                        graph_hash=graph.digest(),
                    ),
                    {parse_unit(name): pi for name, pi in (reply.inclusion or {}).items()},
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
        server, config = self._server.model, self._config
        model = copy.deepcopy(server)
        training = replace(self._schedule.at(server_round), keep_moments=config.entry_score == "saliency")
        result = train_locally(model, self._schedule.stream(client, server_round), training)
        prepared = choose_shipment(
            model,
            LazyVectors(unit_sizes(model), lambda unit: read_unit(model, unit) - read_unit(server, unit)),
            entry_gradient_rms(model, result.moments),
            self._residuals[index],
            config.upload,
            generator=torch.Generator().manual_seed(self._schedule.seed * 1000 + server_round * 10 + index),
        )
        self._residuals[index] = dict(prepared.residual)
        graph = self._server.graph
        return Reply(
            name=client.name,
            partition=index,
            budget=0,
            version=self._server.version,
            graph_hash=graph.digest(),
            numbers={"examples": float(len(client.train)), "train-loss": result.losses[-1]},
            update=pack_update(prepared.update, value_bits=config.value_bits),
            residents=[np.ones(count, bool) for count in graph.num_experts],
            inclusion=drawn_with(prepared),
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
