"""Log files that cannot be written during a run."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter

from configs.schema import RunConfig
from models.checkpoints.load import load_graph
from server.app import run_federation
from server.flower.in_process_grid import RUN_ID
from server.reporting.log_failures import LogFailures
from tests.support.tiny_federation import TinyGrid, tiny_config


def full(*_, **__) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_first_failure_of_a_file_is_a_warning_and_the_reason(caplog):
    failures, written = LogFailures(), []
    failures.attempt("a.txt", written.append, 1)
    assert written == [1] and failures.reasons == {}
    failures.attempt("a.txt", full)
    failures.attempt("a.txt", json.loads, "{")
    failures.attempt("b.json", json.loads, "{")
    failures.attempt("a.txt", written.append, 2)
    assert written == [1, 2]
    assert failures.reasons["a.txt"] == "OSError: [Errno 28] No space left on device"
    assert failures.reasons["b.json"].startswith("JSONDecodeError: ")
    first, second = caplog.records
    assert "a.txt is incomplete" in first.message and first.exc_info is None
    assert second.exc_info[0] is json.JSONDecodeError, "a mistake in the program shows where it is"
    with pytest.raises(KeyboardInterrupt):
        failures.attempt("c", interrupted)


def after_the_first(write):
    """Stands for a disk that is full only during the training."""
    calls: list[bytes] = []

    def fail(writer: RecordWriter, data: bytes) -> None:
        calls.append(data)
        if len(calls) > 1:
            full()
        write(writer, data)

    return fail


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def config(tiny_graph_dir, tmp_path) -> RunConfig:
    return tiny_config(
        tiny_graph_dir, tmp_path, num_rounds=2, local_steps=1, rho_max=1, out=str(tmp_path / "out")
    )


FILES = {
    "rounds.jsonl": "server.reporting.run_log.RunLog.round",
    "pack_sizes.txt": "server.reporting.run_log.RunLog.pack_sizes",
    "merge_round1.json": "server.reporting.run_log.RunLog.rewire",
    "mask_debug.npy": "server.reporting.run_log.RunLog.mask_debug",
    "expert_call_trace.json": "server.reporting.run_log.RunLog.call_trace",
    "tensorboard": "tensorboard.summary.writer.record_writer.RecordWriter.write",
    "cluster_stats.txt": "server.rounds.run_observer._copy_cluster_statistics",
    "summary.json": "server.reporting.summary.write_json",
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_whose_logs_cannot_be_written_ends_with_the_same_model(config, tmp_path, monkeypatch, caplog):
    run_federation(TinyGrid(config), config, run_id=RUN_ID)
    whole = load_graph(config.out).state_dict()
    changed = config.model_copy(update={"out": str(tmp_path / "second")})
    write = after_the_first(RecordWriter.write)
    for file, target in FILES.items():
        monkeypatch.setattr(target, write if file == "tensorboard" else full)
    with caplog.at_level(logging.WARNING):
        summary = run_federation(TinyGrid(changed), changed, run_id=RUN_ID)
    assert set(summary["log_errors"]) >= set(FILES) - {"summary.json"}
    assert all("No space left" in reason for reason in summary["log_errors"].values())
    assert sum("rounds.jsonl is incomplete" in record.message for record in caplog.records) == 1
    assert any("summary.json is incomplete" in record.message for record in caplog.records)
    for name, value in load_graph(changed.out).state_dict().items():
        assert torch.equal(value, whole[name])


def test_a_state_that_cannot_be_written_ends_the_run(config, monkeypatch):
    monkeypatch.setattr("server.state.journal.Journal.save", full)
    with pytest.raises(OSError, match="No space left"):
        run_federation(TinyGrid(config), config, run_id=RUN_ID)
    summary = json.loads((Path(config.log_dir) / "summary.json").read_text())
    assert summary["log_errors"] == {} and "No space left" in summary["stopped"]
