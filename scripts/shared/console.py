"""Console output of the verbs: results on stdout; progress, warnings and errors on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from configs.errors import name_fields
from configs.output import finite

stderr = Console(stderr=True)


OnStep = Callable[[str, int, int | None], None]
# Seconds between two lines of a stage where stderr is no terminal.
LINE_SECONDS = float(os.environ.get("FEDGRAFT_PROGRESS_SECONDS", "10"))


@contextmanager
def progress(precision: str = "") -> Iterator[OnStep]:
    """Progress of stages on stderr: bars on a terminal, else a line per stage every ``LINE_SECONDS``.

    Yields a function of a stage's name, its steps done and their total (None: unknown).

    Args:
        precision: precision of the weights, a line of its own at the first step; empty: none.
    """
    pending = [precision] if precision else []
    with _bars() if stderr.is_terminal else _lines() as show:

        def on_step(stage: str, done: int, total: int | None) -> None:
            while pending:
                stderr.print(f"computing with {pending.pop()} weights", highlight=False)
            show(stage, done, total)

        yield on_step


@contextmanager
def _bars() -> Iterator[OnStep]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    stages: dict[str, TaskID] = {}
    bars = Progress(*columns, console=stderr)

    def on_step(stage: str, done: int, total: int | None) -> None:
        if stage not in stages:
            stages[stage] = bars.add_task(stage, total=total)
        bars.update(stages[stage], completed=done, total=total)

    bars.start()
    try:
        yield on_step
    except BaseException:
        bars.live.transient = True  # the bars are erased, so that the error is the only output
        bars.live.stop()
        raise
    bars.stop()


@contextmanager
def _lines() -> Iterator[OnStep]:
    """Lines ``STAGE DONE/TOTAL, SECONDS s``; after a block without an error also the last state of each stage."""
    started: dict[str, float] = {}
    shown: dict[str, float] = {}
    pending: dict[str, str] = {}

    def on_step(stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        start = started.setdefault(stage, now)
        pending[stage] = f"{stage} {done}{'' if total is None else f'/{total}'}, {now - start:.0f} s"
        if now - shown.setdefault(stage, start) >= LINE_SECONDS:
            shown[stage] = now
            print(pending.pop(stage), file=sys.stderr, flush=True)

    yield on_step
    for line in pending.values():
        print(line, file=sys.stderr, flush=True)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print each warning inside the block as one line on stderr, without its place in the code."""

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        print(f"fedgraft: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def print_result(result: dict[str, Any], *, as_json: bool, lines: Iterable[Any]) -> None:
    """Print ``result`` as one JSON object, or ``lines`` (text or rich tables) for a reader."""
    if as_json:
        sys.stdout.write(json.dumps(finite(result)) + "\n")
        return
    console = Console()
    for line in lines:
        console.print(line, highlight=False)


def option_names(message: str) -> str:
    """Name the options of the command line in place of fields in backquotes: ``n_prune`` becomes ``--n-prune``."""
    return name_fields(message, lambda field: f"--{field.replace('_', '-')}")


def quiet_libraries() -> None:
    """Disable the progress bars and notices of datasets and transformers, which would interleave with ours."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
