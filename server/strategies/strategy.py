"""Interface of a federated method: the five decisions that the round loop leaves to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from federated.aggregation.contribution import Contribution
from federated.protocol.messages import Reply, Request
from federated.wire.packed_stats import PackedStats
from models.graph.unit_vectors import Unit
from server.model.global_model import GlobalModel
from server.reporting.run_log import RewireRecord
from server.state.federation_state import FederationState
from server.state.node_session import NodeSession


class PackedUpdate(Protocol):
    """A packed update in memory or on disk."""

    @property
    def size(self) -> int:
        """Number of bytes."""

    def read(self) -> bytes:
        """Return the bytes."""


@dataclass(frozen=True)
class Accepted:
    """A training reply that passed validation.

    Attributes:
        node: Flower node id of the sender.
        reply: reply as read; its packed update is empty where that was spooled to disk.
        contribution: update and weight for the combination.
        usage: usage counts, per layer ``[E, E]``; empty where clients report none.
        stats: sizes of the packed update.
    """

    node: int
    reply: Reply
    contribution: Contribution
    usage: list[np.ndarray]
    stats: PackedStats


class Strategy(Protocol):
    """A federated method: what is requested, accepted and combined, and how the graph changes after a round.

    The round loop owns the exchange of messages, retries, versions, the application of the change, state and logs.
    A strategy holds no state of a run: that is passed in, so that it can be saved. Wrappers (differential privacy,
    robust aggregation) implement the same methods and delegate.
    """

    def configure(self, global_model: GlobalModel, session: NodeSession, server_round: int) -> Request:
        """Return the request to a node, from the version that it holds to the current one.

        Args:
            global_model: current model.
            session: record of the node.
            server_round: current round, from 1; beyond the last planned round for the final evaluation.
        """

    def accept(self, node: int, reply: Reply, packed: PackedUpdate, global_model: GlobalModel) -> Accepted:
        """Validate the method-specific parts of a training reply.

        Version, graph and the finiteness of all numbers have been checked.

        Args:
            node: Flower node id of the sender.
            reply: reply as read.
            packed: its packed update.
            global_model: model that the reply is an update of.

        Raises:
            RefusedUpdate: the update must not enter the model.
        """

    def combine(self, accepted: Sequence[Accepted], global_model: GlobalModel) -> Mapping[Unit, Tensor]:
        """Combine updates into one change ``[size]`` for each unit that moves.

        Args:
            accepted: replies of a round, in order of the clients' partitions; at least one.
            global_model: model that they are updates of.
        """

    def combine_usage(self, accepted: Sequence[Accepted], global_model: GlobalModel) -> list[np.ndarray]:
        """Combine usage counts into one per layer, float64 ``[E, E]``; empty where none are used.

        Args:
            accepted: as of ``combine``.
            global_model: as of ``combine``.
        """

    def after_round(self, global_model: GlobalModel, state: FederationState) -> RewireRecord | None:
        """Edit the graph after the round's change was applied; None where no edit is due.

        Args:
            global_model: model after the change.
            state: state after the round; usage counts of edited pairs are reset in place.
        """
