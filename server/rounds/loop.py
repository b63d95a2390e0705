"""The round loop of a federation: request, validate, combine, apply, log, edit the graph."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
from flwr.app import MessageType
from flwr.serverapp import Grid

from configs.schema import RunConfig
from federated.protocol.messages import raise_bad_input
from models.runtime.perplexity import LossSum
from server.model.global_model import GlobalModel
from server.privacy.budget import PrivacyBudget
from server.rounds.drift_reports import drift_reports
from server.rounds.exchange import Answer, Patience, wait_for_nodes
from server.rounds.node_requests import NodeRequests, add_retries
from server.rounds.participants import choose_participants
from server.rounds.reply_spool import ReplySpool
from server.rounds.run_observer import RunObserver
from server.rounds.validation import RoundReplies, check_evaluations, check_replies, held_out_loss
from server.state.checkpoint import write_checkpoint
from server.state.federation_state import FederationState
from server.state.journal import Journal
from server.strategies.strategy import Strategy

ROUND_ATTEMPTS = 2  # exchanges of a round before the run ends for lack of a usable reply
_NODES_TIMEOUT = 120.0  # seconds until the clients must have connected

_log = logging.getLogger(__name__)


class Federation:
    """One run, from the first round to the final evaluation.

    Args:
        grid: Flower's.
        config: run configuration.
        global_model: model that the clients share.
        strategy: federated method.
        observer: writer of the logs.
        journal: saved state of the run; None: it is not saved.
        state: state of the run that is continued; None: a new run.
        run_id: id of the run that is continued, see ``Request``; 0: a new run.

    Attributes:
        state: everything that the rounds accumulate apart from the model; the other attributes are the arguments.
    """

    def __init__(
        self,
        *,
        grid: Grid,
        config: RunConfig,
        global_model: GlobalModel,
        strategy: Strategy,
        observer: RunObserver,
        journal: Journal | None = None,
        state: FederationState | None = None,
        run_id: int = 0,
    ) -> None:
        self.grid, self.config, self.observer = grid, config, observer
        self.global_model, self.strategy = global_model, strategy
        self.state, self.journal = state or FederationState(), journal
        self._budget = PrivacyBudget(config.privacy)
        self._requests = NodeRequests(
            grid, global_model, strategy, run_id=run_id, departed=self.state.departed
        )

    def run(self) -> None:
        """Run all rounds and the final evaluation.

        Raises:
            UserError: too few clients connect, or a client reports bad input and no reply is usable.
            RuntimeError: fewer than ``min-clients`` replies are usable in ``ROUND_ATTEMPTS`` exchanges of a round.
        """
        nodes = wait_for_nodes(self.grid, self.config.num_clients, timeout=_NODES_TIMEOUT)
        self.state.connect(nodes)
        while self.state.server_round < self.config.num_rounds and not self.state.stopped:
            self._round(self.state.server_round + 1)
        self._evaluate()

    def _round(self, server_round: int) -> None:
        """Train on the nodes of the round, apply the combined change, log the round, edit the graph."""
        started, trained_on = time.perf_counter(), self.global_model.graph
        with ReplySpool(self.observer.log_dir) as spool:
            answers, replies = self._collect(server_round, spool)
            self._compare(held_out_loss(replies))
            change = self.strategy.combine(replies.accepted, self.global_model)
        usage = self.strategy.combine_usage(replies.accepted, self.global_model)
        self.global_model.drop_steps(min(each.held_version for each in self.state.sessions.values()))
        self.global_model.advance(
            change, value_bits=self.config.value_bits, density=self.config.downlink_density
        )
        self._update_state(server_round, replies, usage)
        self.observer.round(
            server_round,
            replies,
            answers,
            graph=trained_on,
            usage=self.state.usage.counts,
            round_usage=usage,
            drift=self.state.drift,
            seconds=time.perf_counter() - started,
            stopped=self.state.stopped,
            spent=self._budget.spent(self.state.updates),
        )
        record = self.strategy.after_round(self.global_model, self.state)
        self.state.graph_version = self.global_model.graph.version
        if record is not None:
            self.observer.rewire(record)
        if self.journal is not None:
            self.journal.save(self.global_model, self.state, self.observer.history)
        if self.config.checkpoint_every and server_round % self.config.checkpoint_every == 0:
            keep = self.config.keep_checkpoints
            write_checkpoint(self.observer.log_dir, self.global_model, self.state, keep=keep)

    def _collect(self, server_round: int, spool: ReplySpool) -> tuple[dict[int, Answer], RoundReplies]:
        """Request an update from the nodes of the round; repeat the exchange where too few replies are usable."""
        quorum = self.config.participation.quorum
        answers, replies = self._exchange(server_round, 0, spool)
        for attempt in range(1, ROUND_ATTEMPTS):
            if len(replies.accepted) >= quorum:
                break
            _raise_bad_input(answers)
            _log.warning("round %d is repeated: %s", server_round, _reasons(replies))
            again, replies = self._exchange(server_round, attempt, spool)
            answers = add_retries(answers, again)
        if len(replies.accepted) < quorum:
            self.observer.add_traffic(answers)
            _raise_bad_input(answers)
            raise RuntimeError(_too_few(replies, quorum))
        return answers, replies

    def _exchange(
        self, server_round: int, attempt: int, spool: ReplySpool
    ) -> tuple[dict[int, Answer], RoundReplies]:
        """Exchange with the nodes that are connected now and drawn for the round."""
        keys, state = self.config.participation, self.state
        connected = list(self.grid.get_node_ids())
        if connected and set(connected) != set(state.sessions):
            state.connect(sorted(connected))
        chosen = choose_participants(
            state.sessions, server_round, keys, seed=self.config.seed, attempt=attempt
        )
        patience = Patience(
            keys.reply_timeout, chosen.enough, keys.round_deadline or None, min(keys.quorum, chosen.enough)
        )
        sessions = {node: state.sessions[node] for node in chosen.asked}
        for session in sessions.values():
            session.asked_round = server_round
        answers = self._requests.ask(sessions, MessageType.TRAIN, server_round, patience, spool)
        return answers, check_replies(
            answers,
            self.global_model,
            self.strategy,
            partitions=self.state.partitions(),
            weight_cap=self.config.weight_cap,
            inclusion=chosen.inclusion,
        )

    def _update_state(self, server_round: int, replies: RoundReplies, usage: Sequence[np.ndarray]) -> None:
        """Record that the round's change is in the model; decide on drift and whether the run ends early."""
        state, config = self.state, self.config
        state.server_round, state.model_version = server_round, self.global_model.version
        for accepted in replies.accepted:
            examples = accepted.reply.numbers.get("examples", 0.0)
            state.accept(accepted.node, accepted.reply.partition, examples=examples)
        state.usage.add(usage, decay=config.usage_decay)
        reports = drift_reports(replies, self.global_model.graph)
        state.drift.add(reports, server_round, config.drift_detection)
        if server_round < config.num_rounds:
            state.stopped = self._budget.exhausted(state.updates) or state.early_stop.after(
                held_out_loss(replies),
                rounds=config.early_stop_rounds,
                delta=config.early_stop_delta,
                target=config.early_stop_loss,
            )

    def _compare(self, loss: LossSum) -> None:
        """Compare the held-out loss of the present model with the lowest one."""
        self.state.best.after(
            loss,
            server_round=self.state.server_round,
            version=self.global_model.version,
            copy_hash=self.global_model.copy_hash,
        )

    def _evaluate(self) -> None:
        """Evaluate the final model on the held-out text of every client."""
        patience = Patience(self.config.reply_timeout)
        last = self.state.server_round + 1
        answers = self._requests.ask(self.state.sessions, MessageType.EVALUATE, last, patience)
        evaluations = check_evaluations(answers, self.global_model, self.state.partitions())
        self._compare(evaluations.loss)
        self.observer.finish(evaluations, answers)


def _raise_bad_input(answers: dict[int, Answer]) -> None:
    for answer in answers.values():
        raise_bad_input(answer.error_code, answer.error)


def _too_few(replies: RoundReplies, quorum: int) -> str:
    """Why a round ends the run."""
    if not replies.accepted:
        return f"no client gave a usable update: {_reasons(replies)}"
    found = f"expected usable updates of at least {quorum} clients, got {len(replies.accepted)}"
    return f"{found}: {_reasons(replies)}" if replies.refused else f"{found}; lower min-clients"


def _reasons(replies: RoundReplies) -> str:
    return "; ".join(sorted(set(replies.refused.values())))
