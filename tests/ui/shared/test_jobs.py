from __future__ import annotations

import time

import pytest

from configs.errors import UserError
from ui.shared import jobs
from ui.shared.jobs import Job, Progress, command_line


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Run a Python text in place of ``fedgraft``."""

    def job(text: str, *arguments: str) -> Job:
        path = tmp_path / "program.py"
        path.write_text(text)
        monkeypatch.setattr(jobs, "_COMMAND", path)
        found = Job(arguments, tmp_path)
        found.start()
        return found

    return job


def finished(job: Job) -> Job:
    list(job.follow())
    assert not job.running
    return job


def test_the_result_is_the_json_object_of_the_command(program):
    job = finished(program("import sys, json; print(json.dumps({'arguments': sys.argv[1:]}))", "prune"))
    assert job.result() == {"arguments": ["prune", "--json"]}


def test_the_error_of_the_command_is_raised(program):
    job = finished(program('print(\'{"error": "expected x"}\'); raise SystemExit(2)'))
    with pytest.raises(UserError, match="^expected x$"):
        job.result()


def test_a_command_without_a_result_is_an_error_with_its_last_line(program):
    job = finished(program("raise RuntimeError('out of memory')"))
    with pytest.raises(UserError, match="without a result: RuntimeError: out of memory"):
        job.result()


def test_progress_is_the_last_stage_and_warnings_are_apart(program):
    lines = "writing weights (MiB) 3/12, 1 s\\nfedgraft: warning: no data\\n"
    job = finished(program(f"import sys; sys.stderr.write('{lines}'); print('{{}}')"))
    assert job.progress() == Progress("writing weights (MiB) 3 of 12", 0.25)
    assert job.warnings() == ["no data"]


def test_progress_of_an_unknown_total_and_of_other_lines_has_no_share(program):
    assert finished(program("import sys; sys.stderr.write('reading 3, 1 s\\n')")).progress() == Progress(
        "reading 3"
    )
    assert finished(program("import sys; sys.stderr.write('round 1/3  2.0 s\\n')")).progress() == Progress(
        "round 1/3  2.0 s"
    )
    assert finished(program("")).progress() == Progress("starting")


def test_progress_is_reported_while_the_command_runs(program):
    job = program("import sys, time; print('reading 1/2, 0 s', file=sys.stderr, flush=True); time.sleep(1)")
    assert Progress("reading 1 of 2", 0.5) in list(job.follow())


def test_cancel_interrupts_the_command_which_then_has_no_result(program):
    job = program(
        "import time\ntry:\n    print('started', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('cleaned')"
    )
    while "started" not in job._out.read_text():
        time.sleep(0.05)
    job.cancel()
    finished(job)
    assert "cleaned" in job._out.read_text()
    with pytest.raises(UserError, match="^canceled"):
        job.result()
    job.cancel()


def test_a_command_that_goes_on_after_cancel_is_killed(program, monkeypatch):
    monkeypatch.setattr(jobs, "STOP_SECONDS", 0.2)
    job = program(
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(60)"
    )
    while "deaf" not in job._out.read_text():
        time.sleep(0.05)
    job.cancel()
    finished(job)


def test_the_command_itself_starts(tmp_path):
    job = Job(
        ["experts", "select", "--saliency", str(tmp_path / "absent.npz"), "--out", str(tmp_path)], tmp_path
    )
    job.start()
    finished(job)
    with pytest.raises(UserError, match="absent.npz: expected a saliency file"):
        job.result()


def test_command_lines_are_quoted_for_a_shell():
    assert command_line("prune", "--model", "my model") == "fedgraft prune --model 'my model'"
