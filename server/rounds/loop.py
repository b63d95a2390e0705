"""The federation as the server runs it: rounds of training and aggregation, merges between them, logs throughout."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from flwr.app import MessageType
from flwr.serverapp import Grid
from torch import Tensor

from configs.schema import RunConfig
from federated.aggregation.combine import aggregate
from federated.data.blocks import Blocks, take
from federated.protocol.messages import Request, raise_user_error, write_request
from federated.updates.update import Unit
from server.model.global_model import GlobalModel
from server.rounds.early_stop import EarlyStop
from server.rounds.exchange import Answer, exchange, wait_for_nodes
from server.rounds.reply_spool import ReplySpool
from server.rounds.rewire import UsageAverage, merge
from server.rounds.run_observer import RunObserver
from server.rounds.validation import RoundReplies, check_evaluations, check_replies, held_out_loss

_NODES_TIMEOUT = 120.0  # seconds until the clients must have connected


class Federation:
    """One run, from the first round to the final evaluation.

    Args:
        grid: Flower's.
        config: of the run.
        server: the global model.
        observer: writes the logs.
        validation: the server's own text; None without any.
    """

    def __init__(
        self,
        *,
        grid: Grid,
        config: RunConfig,
        server: GlobalModel,
        observer: RunObserver,
        validation: Blocks | None,
    ) -> None:
        self.grid, self.config, self.server, self.observer = grid, config, server, observer
        self.validation = take(validation, config.eval_blocks) if validation is not None else None
        self.usage = UsageAverage(config.usage_decay)
        self.early_stop = EarlyStop(rounds=config.early_stop_rounds, delta=config.early_stop_delta)
        # Node -> the version of the global model on its disk.
        self._held: dict[int, int] = {}
        # Node -> the client that it answers for.
        self._partitions: dict[int, int] = {}
        # Node -> the last server round of which its update went into the model.
        self._accepted: dict[int, int] = {}

    def run(self) -> None:
        """Run all rounds.

        Raises:
            UserError: what a client reports as bad input, or too few clients.
            RuntimeError: no client gave a usable update in a round.
        """
        nodes = wait_for_nodes(self.grid, self.config.num_clients, timeout=_NODES_TIMEOUT)
        for server_round in range(1, self.config.num_rounds + 1):
            if self._round(server_round, nodes):
                break
        answers = self._ask(nodes, MessageType.EVALUATE, server_round + 1)
        self.observer.finish(check_evaluations(answers, self.server, self._partitions))

    def _round(self, server_round: int, nodes: list[int]) -> bool:
        """Train, aggregate and, where it is time, merge; whether the run ends early after this round."""
        started, trained_on = time.perf_counter(), self.server.graph
        with ReplySpool(self.observer.log_dir) as spool:
            answers = self._ask(nodes, MessageType.TRAIN, server_round, spool)
            replies = self._check(answers, server_round)
            change = self._aggregate(replies)
        self.server.drop_steps(min(self._held.get(node, 0) for node in nodes))
        self.server.advance(change, value_bits=self.config.value_bits, density=self.config.downlink_density)
        self.usage.add([accepted.usage for accepted in replies.accepted])
        planned = server_round == self.config.num_rounds
        stopped = None if planned else self.early_stop.after(held_out_loss(replies))
        seconds = time.perf_counter() - started
        self.observer.round(
            server_round,
            replies,
            answers,
            graph=trained_on,
            usage=self.usage.counts,
            seconds=seconds,
            stopped=stopped,
        )
        if self.config.rho_max and server_round % self.config.merge_every == 0:
            self._merge(server_round)
        if self.config.checkpoint_every and server_round % self.config.checkpoint_every == 0:
            self.observer.checkpoint(server_round)
        return stopped is not None

    def _check(self, answers: dict[int, Answer], server_round: int) -> RoundReplies:
        """What may touch the model; notes who sent it."""
        replies = check_replies(
            answers,
            self.server,
            attention=self.config.attention_lora,
            client_weight=self.config.client_weight,
            partitions=self._partitions,
        )
        _raise_if_nobody(replies)
        self._accepted |= {accepted.node: server_round for accepted in replies.accepted}
        self._partitions |= {accepted.node: accepted.reply.partition for accepted in replies.accepted}
        return replies

    def _aggregate(self, replies: RoundReplies) -> dict[Unit, Tensor]:
        return aggregate(
            [accepted.contribution for accepted in replies.accepted],
            combine=self.config.combine,
            server_learning_rate=self.config.server_learning_rate,
            clip_norm_multiple=self.config.clip_norm_multiple,
        )

    def _merge(self, server_round: int) -> None:
        record = merge(
            self.server,
            self.usage,
            server_round=server_round,
            rho_max=self.config.rho_max,
            validation=self.validation,
            max_drift=self.config.merge_max_drift,
        )
        self.observer.merge(record)

    def _ask(
        self, nodes: Iterable[int], message_type: str, server_round: int, spool: ReplySpool | None = None
    ) -> dict[int, Answer]:
        """Exchange with all nodes; those that lack the graph or hold another version than assumed are asked again."""
        answers = self._exchange(nodes, message_type, server_round, spool)
        lacking = [node for node, answer in answers.items() if answer.needs_recipe]
        if lacking and (recipe := self.server.recipe()):
            again = self._exchange(lacking, message_type, server_round, spool, recipe)
            answers |= {node: _with_bytes_of(answer, answers[node]) for node, answer in again.items()}
        behind = {
            node: answer.held_version for node, answer in answers.items() if answer.held_version is not None
        }
        if behind:
            self._held |= behind
            again = self._exchange(behind, message_type, server_round, spool)
            answers |= {node: _with_bytes_of(answer, answers[node]) for node, answer in again.items()}
        for node, answer in answers.items():
            if answer.content is not None:
                self._held[node] = self.server.version
            elif answer.held_version is not None:
                answers[node] = replace(answer, error=f"holds version {answer.held_version} after a resend")
        return answers

    def _exchange(
        self,
        nodes: Iterable[int],
        message_type: str,
        server_round: int,
        spool: ReplySpool | None,
        recipe: bytes = b"",
    ) -> dict[int, Answer]:
        requests = {node: replace(self._request(node, server_round), recipe=recipe) for node in nodes}
        contents = {node: write_request(request) for node, request in requests.items()}
        return exchange(
            self.grid,
            contents,
            message_type,
            group=str(server_round),
            timeout=self.config.reply_timeout,
            spool=spool,
        )

    def _request(self, node: int, server_round: int) -> Request:
        steps, snapshot = self.server.catch_up(self._held.get(node, 0))
        return Request(
            server_round=server_round,
            version=self.server.version,
            graph_hash=self.server.graph.digest(),
            base_fingerprint=self.server.fingerprint,
            copy_hash=self.server.copy_hash,
            steps=steps,
            snapshot=snapshot,
            last=server_round == self.config.num_rounds,
            accepted_round=self._accepted.get(node, 0),
        )


def _with_bytes_of(answer: Answer, earlier: Answer) -> Answer:
    """The answer, with the bytes of both exchanges: what was sent in vain was sent, too."""
    return replace(
        answer,
        bytes_up=answer.bytes_up + earlier.bytes_up,
        bytes_down=answer.bytes_down + earlier.bytes_down,
    )


def _raise_if_nobody(replies: RoundReplies) -> None:
    if replies.accepted:
        return
    for reason in replies.refused.values():
        raise_user_error(reason)
    reasons = "; ".join(sorted(set(replies.refused.values())))
    raise RuntimeError(f"no client gave a usable update: {reasons}")
