"""Ours, in one process: what clients ship and the server sends is packed, counted and unpacked as on the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.federated_methods import Client, Schedule, Traffic, held_out_losses
from clients.shipment import limits
from clients.slopes import entry_slopes
from clients.trainer import train_locally
from configs.schema import RunConfig
from federated.aggregation import Contribution, aggregate
from federated.codec import pack_update, unpack_update
from federated.entries import magnitude, saliency
from federated.messages import Reply, Request, message_bytes, write_reply, write_request
from federated.selection import choose_update
from models.checkpoint import read_graph
from models.perplexity import LossSum
from models.units import Unit, read_unit, unit_shapes, unit_sizes
from server.global_model import GlobalModel


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
            shapes=unit_shapes(model) if self._config.low_rank else None,
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


def _unit(name: str) -> Unit:
    layer, expert = name.split(".")
    return int(layer), int(expert)
