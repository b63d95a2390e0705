"""Log files, TensorBoard events and summary of a run, written as its rounds complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from configs.output import finite
from experts.graph.expert_graph import ExpertGraph
from federated.protocol.messages import Reply
from federated.protocol.steps import step_stats
from federated.wire.packed_stats import PackedStats
from server.model.global_model import GlobalModel
from server.privacy.budget import PrivacySpent
from server.reporting.log_failures import LogFailures
from server.reporting.run_log import (
    MASK_FILE,
    PACK_FILE,
    ROUNDS_FILE,
    TRACE_FILE,
    RewireRecord,
    RoundRecord,
    RunLog,
)
from server.reporting.summary import SUMMARY_FILE, clear_summary, write_summary
from server.reporting.tensorboard_log import TensorBoardLog
from server.rounds.exchange import Answer
from server.rounds.round_record import round_record
from server.rounds.validation import Evaluations, RoundReplies, reply_loss
from server.state.checkpoint import CHECKPOINTS
from server.state.drift import Drift
from server.state.run_history import TRAFFIC, ClientFigures, RunHistory
from server.strategies.growth import attached_visits
from server.strategies.strategy import Accepted

_EVENTS = "tensorboard"


class RunObserver:
    """Writer of a run's logs; removes those of an earlier run in the same folder.

    A log file that cannot be written later does not end the run; the summary names it.

    Args:
        log_dir: folder of the logs.
        global_model: model that the clients share, read only.
        history: record of the run that is continued, whose logs are kept up to its last round; None: a new run.

    Attributes:
        history: record of the run, with the rounds written since.
    """

    def __init__(
        self, log_dir: Path, *, global_model: GlobalModel, history: RunHistory | None = None
    ) -> None:
        experts = global_model.graph.num_experts
        self.history = history or RunHistory()
        resumed = self.history.rounds or None
        self.log_dir, self._global_model = log_dir, global_model
        self._log = RunLog(log_dir, num_layers=len(experts), experts_per_layer=experts, resumed=resumed)
        if resumed is None:
            clear_summary(log_dir)
            for folder in (_EVENTS, CHECKPOINTS):
                shutil.rmtree(log_dir / folder, ignore_errors=True)
        self._failures = LogFailures()
        self._failures.attempt("cluster_stats.txt", _copy_cluster_statistics, global_model.source, log_dir)
        self._tensorboard = TensorBoardLog(log_dir, resumed=resumed)
        self._tensorboard.recall(self.history.traffic)
        self._last_perplexity: float | None = None
        self._summary: dict[str, Any] = {}

    def round(
        self,
        server_round: int,
        replies: RoundReplies,
        answers: Mapping[int, Answer],
        *,
        graph: ExpertGraph,
        usage: Sequence[np.ndarray],
        seconds: float,
        round_usage: Sequence[np.ndarray] = (),
        drift: Drift | None = None,
        stopped: str | None = None,
        spent: PrivacySpent = PrivacySpent(),
    ) -> None:
        """Write a completed round.

        Args:
            server_round: number of the round, from 1.
            replies: validated answers.
            answers: all answers, whose traffic is logged.
            graph: graph that the clients trained on.
            usage: moving average of usage, per layer ``[E, E]``; empty where clients report none.
            seconds: wall time.
            round_usage: usage in this round alone, per layer ``[E, E]``.
            drift: detection of drift after the round; None: as before the first.
            stopped: reason why this is the last round although more were planned.
            spent: differential privacy of the models so far.
        """
        step = self._pack_sizes(server_round, replies)
        record = round_record(
            server_round,
            replies,
            answers,
            graph=graph,
            history=self.history,
            step=step,
            dense_bytes=self._global_model.dense_bytes(),
            seconds=seconds,
            drift=drift,
            stopped=stopped,
        )
        attached = attached_visits(graph, round_usage)
        record = replace(record, attached=attached, epsilon=spent.epsilon, delta=spent.delta)
        self._add(record, replies, answers, drift or Drift())
        self._write_round(record, replies, graph, usage)

    def _add(
        self, record: RoundRecord, replies: RoundReplies, answers: Mapping[int, Answer], drift: Drift
    ) -> None:
        """Add a round to the history."""
        self.history.rounds = record.round
        self.history.epsilon, self.history.delta = record.epsilon, record.delta
        if record.drifted:
            self.history.drift_rounds.append(record.round)
        for accepted in replies.accepted:
            self.history.accepted(accepted.node)
            if accepted.reply.partition in drift.drifted:
                self.history.clients[accepted.reply.partition].drift_rounds.append(record.round)
        for node, reason in replies.refused.items():
            if not answers[node].surplus:  # a client that others were faster than has done nothing wrong
                self.history.refused(node, reason)
        for name in TRAFFIC:
            self.history.traffic[name] += getattr(record, name)

    def _write_round(
        self, record: RoundRecord, replies: RoundReplies, graph: ExpertGraph, usage: Sequence[np.ndarray]
    ) -> None:
        self._failures.attempt(ROUNDS_FILE, self._log.round, record)
        self._failures.attempt(_EVENTS, self._tensorboard.round, record)
        held = {each.reply.name: each.reply.residents for each in replies.accepted}
        self._failures.attempt(_EVENTS, self._tensorboard.pictures, record.round, graph, usage, held)
        if record.round == 1:
            first = graph.restrict(replies.accepted[0].reply.residents)
            self._failures.attempt(MASK_FILE, self._log.mask_debug, first.masks)

    def _pack_sizes(self, server_round: int, replies: RoundReplies) -> PackedStats | None:
        """Write the sizes of all packed updates; returns those of the server's step, None without one."""
        for accepted in replies.accepted:
            self._note(accepted)
            name = accepted.reply.name
            self._failures.attempt(PACK_FILE, self._log.pack_sizes, server_round, name, accepted.stats)
        if not self._global_model.steps:
            return None
        step = step_stats(self._global_model.steps[-1])
        self._failures.attempt(PACK_FILE, self._log.pack_sizes, server_round, "server", step)
        return step

    def rewire(self, record: RewireRecord) -> None:
        """Write the graph edits of a round."""
        self.history.edits += len(record.edits)
        self._failures.attempt(f"merge_round{record.round}.json", self._log.rewire, record)
        self._failures.attempt(_EVENTS, self._tensorboard.rewire, record)

    def add_traffic(self, answers: Mapping[int, Answer]) -> None:
        """Add the bytes of an exchange that is not part of a completed round to the summary's totals."""
        self.history.traffic["bytes_up"] += sum(answer.bytes_up for answer in answers.values())
        self.history.traffic["bytes_down"] += sum(answer.bytes_down for answer in answers.values())

    def finish(self, evaluations: Evaluations, answers: Mapping[int, Answer]) -> None:
        """Write the held-out perplexity of the final global model, per client and overall.

        Args:
            evaluations: validated answers.
            answers: all answers, whose traffic is counted.
        """
        self.add_traffic(answers)
        for evaluation in evaluations.accepted:
            client = self._client(evaluation.node, evaluation.reply)
            client.perplexity_after = evaluation.loss.perplexity
            client.graph_hash = evaluation.reply.graph_hash
        self._last_perplexity = evaluations.loss.perplexity
        after = {client.name: client.perplexity_after for client in self.history.clients.values()}
        step = self.history.rounds + 1
        self._failures.attempt(_EVENTS, self._tensorboard.perplexities, after, self._last_perplexity, step)

    def trace(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write the call trace of the final model."""
        self._failures.attempt(TRACE_FILE, self._log.call_trace, entries)

    def close(
        self, *, out: str, stopped: str | None = None, best: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Close the event files, write ``summary.json`` and return the summary.

        Args:
            out: folder of the final model; empty: not written.
            stopped: reason why the run ended before its last planned round.
            best: entry of the model with the lowest held-out loss (``BestRound.entry``); None: not known.
        """
        self._failures.attempt(_EVENTS, self._tensorboard.close)
        self._summary = {
            "rounds": self.history.rounds,
            "stopped": stopped,
            "clients": self.history.client_summaries(),
            **self.history.traffic,
            "edits": self.history.edits,
            "last": {"round": self.history.rounds, "perplexity": self._last_perplexity},
            "best": best,
            "drift_rounds": self.history.drift_rounds,
            "epsilon": self.history.epsilon,
            "delta": self.history.delta,
            "graph_hash": self._global_model.graph.digest(),
            "out": out,
            "log_dir": str(self.log_dir),
        }
        return self._write_summary()

    def add_best(self, best: Mapping[str, Any], write: Callable[[Path], None]) -> dict[str, Any]:
        """Write the best model, and its entry into the summary written before; returns the summary.

        Args:
            best: entry of the model.
            write: writes the model to its folder.
        """
        folder = Path(best["out"])
        name = str(folder.relative_to(self.log_dir))
        self._failures.attempt(name, write, folder)
        if name not in self._failures.reasons:
            self._summary["best"] = best
        return self._write_summary()

    def _write_summary(self) -> dict[str, Any]:
        summary = finite(self._summary | {"log_errors": self._failures.reasons})
        self._failures.attempt(SUMMARY_FILE, write_summary, self.log_dir, summary)
        return summary

    def _note(self, accepted: Accepted) -> None:
        reply = accepted.reply
        client = self._client(accepted.node, reply)
        if client.perplexity_before is None:
            client.perplexity_before = reply_loss(reply, "valid").perplexity
        if "personal-tokens" in reply.numbers:
            client.perplexity_after_personal = reply_loss(reply, "personal").perplexity

    def _client(self, node: int, reply: Reply) -> ClientFigures:
        return self.history.client(node, reply, num_experts=max(self._global_model.graph.num_experts))


def _copy_cluster_statistics(source: str, log_dir: Path) -> None:
    """Copy the cluster statistics of the bootstrap into the log directory."""
    statistics = Path(source) / "cluster_stats.txt"
    if statistics.is_file():
        shutil.copyfile(statistics, log_dir / statistics.name)
