"""Requests to all nodes, with the retries of the protocol: the recipe of the graph, and the steps a node lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from flwr.serverapp import Grid

from federated.protocol.messages import write_request
from server.model.global_model import GlobalModel
from server.rounds.exchange import Answer, Patience, exchange
from server.rounds.reply_spool import ReplySpool
from server.state.node_session import NodeSession
from server.strategies.strategy import Strategy


@dataclass(frozen=True)
class NodeRequests:
    """Sender of a strategy's requests.

    Attributes:
        grid: Flower's.
        global_model: current model.
        strategy: configures each request.
        run_id: run whose files the clients use, where this run continues another; 0: their own.
        departed: see ``FederationState``; sent to nodes whose client index is not known yet.
    """

    grid: Grid
    global_model: GlobalModel
    strategy: Strategy
    run_id: int = 0
    departed: Mapping[int, int] = field(default_factory=dict)

    def ask(
        self,
        sessions: Mapping[int, NodeSession],
        message_type: str,
        server_round: int,
        patience: Patience,
        spool: ReplySpool | None = None,
    ) -> dict[int, Answer]:
        """Exchange one request and answer with each node and record the version that the node then holds.

        A node without the graph is asked again with the recipe, one at another version than recorded with the steps
        since that version; each of these at most once.

        Args:
            sessions: by node id.
            message_type: ``train`` or ``evaluate``.
            server_round: current round.
            patience: how long replies are waited for, in each exchange.
            spool: receives the packed updates; None: they stay in memory.
        """
        send = partial(self._send, message_type, server_round, patience, spool)
        answers = send(sessions)
        lacking = [node for node, answer in answers.items() if answer.needs_recipe]
        if lacking and (recipe := self.global_model.recipe()):
            again = {node: sessions[node] for node in lacking}
            answers = add_retries(answers, send(again, recipe))
        behind = {node: each.held_version for node, each in answers.items() if each.held_version is not None}
        for node, version in behind.items():
            sessions[node].held_version = version
        if behind:
            again = {node: sessions[node] for node in behind}
            answers = add_retries(answers, send(again))
        for node, answer in answers.items():
            if not answer.surplus:
                sessions[node].heard(not answer.silent, server_round)
        return {node: self._settle(sessions[node], answer) for node, answer in answers.items()}

    def _send(
        self,
        message_type: str,
        server_round: int,
        patience: Patience,
        spool: ReplySpool | None,
        sessions: Mapping[int, NodeSession],
        recipe: bytes = b"",
    ) -> dict[int, Answer]:
        contents = {}
        for node, session in sessions.items():
            request = self.strategy.configure(self.global_model, session, server_round)
            last = self.departed if session.partition is None else {}
            request = replace(request, recipe=recipe, run_id=self.run_id, accepted_rounds=last)
            contents[node] = write_request(request)
        return exchange(
            self.grid, contents, message_type, group=str(server_round), patience=patience, spool=spool
        )

    def _settle(self, session: NodeSession, answer: Answer) -> Answer:
        """Record the version that a node holds after its last answer."""
        if answer.content is not None:
            session.held_version = self.global_model.version
        elif answer.held_version is not None:
            return replace(answer, error=f"holds version {answer.held_version} after a resend")
        return answer


def add_retries(first: Mapping[int, Answer], again: Mapping[int, Answer]) -> dict[int, Answer]:
    """Replace answers by those of a retry, with the summed traffic of both: failed requests count."""
    return {**first, **{node: _add_bytes(answer, first[node]) for node, answer in again.items()}}


def _add_bytes(answer: Answer, earlier: Answer) -> Answer:
    return replace(
        answer,
        bytes_up=answer.bytes_up + earlier.bytes_up,
        bytes_down=answer.bytes_down + earlier.bytes_down,
    )
