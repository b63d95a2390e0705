"""Command line and result file of the benchmarks.

A full run writes ``benchmarks/results/NAME.json``; ``--quick`` runs the same code on little data and writes nothing.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

import psutil
import torch
import typer

from benchmarks.support.stored import chosen_work
from configs.errors import UserError
from configs.output import write_json
from scripts.shared.console import print_result, progress, quiet_libraries, stderr
from scripts.shared.options import JsonFlag

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

OnStep = Callable[[str, int, int], None]
QuickFlag = Annotated[bool, typer.Option(help="Run a smoke test on little data; writes no result.")]
WorkFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder of finished runs, which are reused; for a full run in the user's cache folder."
    ),
]


@dataclass(frozen=True)
class Measured:
    """Result of a benchmark.

    Attributes:
        figures: headline numbers; None for one that could not be measured, with the reason in ``notes``.
        peers: measurements behind the figures: peers, settings, single runs (any JSON).
        notes: explanation of a figure, by its name.
        seconds: duration of the measurement if parts of it ran in an earlier process; None: that of this process.
    """

    figures: Mapping[str, float | None]
    peers: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None


class ResumableMeasure(Protocol):
    """Measurement that stores its finished runs in the folder ``work``; None: a temporary one."""

    def __call__(self, quick: bool, on_step: OnStep, *, work: Path | None) -> Measured: ...


def run_benchmark(name: str, measure: Callable[[bool, OnStep], Measured]) -> None:
    """Parse the command line of benchmark ``name``, measure, print, and write the result of a full run.

    Args:
        name: name of the module under ``benchmarks``.
        measure: called with ``quick`` and a progress callback (stage, steps done, their total).

    Exits with 2 for bad input, e.g. if the data of a full run is absent.
    """

    def main(quick: QuickFlag = False, as_json: JsonFlag = False) -> None:
        report(name, measure, quick=quick, as_json=as_json)

    typer.run(main)


def run_resumable(name: str, measure: ResumableMeasure) -> None:
    """Do the same as ``run_benchmark`` for a measurement that stores its finished runs, with an option ``--work``."""

    def main(quick: QuickFlag = False, work: WorkFolder = None, as_json: JsonFlag = False) -> None:
        """Measure; a full run that was interrupted goes on from its finished runs."""
        report_resumable(name, measure, quick=quick, work=work, as_json=as_json)

    typer.run(main)


def report_resumable(
    name: str, measure: ResumableMeasure, *, quick: bool, work: Path | None, as_json: bool
) -> None:
    """Do the same as ``report`` for a measurement that stores its finished runs in ``chosen_work``."""
    folder = chosen_work(name, work, quick=quick)
    report(name, partial(measure, work=folder), quick=quick, as_json=as_json)


def report(name: str, measure: Callable[[bool, OnStep], Measured], *, quick: bool, as_json: bool) -> None:
    """Measure, print, and write the result of a full run; the arguments are those of ``run_benchmark``."""
    quiet_libraries()
    with exit_on_bad_input():
        result = measured_result(name, measure, quick=quick)
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        write_json(RESULTS / f"{name}.json", result)
    print_result(result, as_json=as_json, lines=_lines(name, result, quick))


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Print a ``UserError`` on stderr and exit with 2 in its place."""
    try:
        yield
    except UserError as error:
        stderr.print(f"error: {error}", highlight=False, markup=False)
        raise typer.Exit(2) from None


def measured_result(name: str, measure: Callable[[bool, OnStep], Measured], *, quick: bool) -> dict[str, Any]:
    """Measure once: ``{"figures", "peers", "notes", "machine", "command", "commit", "seconds"}``."""
    start = time.perf_counter()
    with progress() as on_step:
        measured = measure(quick, on_step)
    return {
        "figures": dict(measured.figures),
        "peers": dict(measured.peers),
        "notes": dict(measured.notes),
        "machine": machine(),
        "command": f"python -m benchmarks.{name}" + (" --quick" if quick else ""),
        "commit": commit(),
        "seconds": round(time.perf_counter() - start if measured.seconds is None else measured.seconds, 1),
    }


def measured_apart(module: str, arguments: Sequence[str]) -> dict[str, float]:
    """Run ``python -m benchmarks.support.MODULE ARGUMENTS`` and parse the JSON object in its last line of output.

    Raises:
        RuntimeError: the process failed; the message holds the last line of its error.
    """
    command = [sys.executable, "-m", f"benchmarks.support.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} {arguments} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """Machine of this run: processor, cores, memory in GiB, matrix instructions, threads, accelerator, versions."""
    flags = _cpu_field("flags").split()
    return {
        "processor": _cpu_field("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "matrix_instructions": [
            name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags
        ],
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit() -> str:
    """Hash of the commit, with ``-dirty`` if tracked files other than results differ from it; empty without git."""
    head = _git("rev-parse", "HEAD")
    return head + (
        "-dirty" if _git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results") else ""
    )


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_field(name: str) -> str:
    if sys.platform != "linux":
        return ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _lines(name: str, result: Mapping[str, Any], quick: bool) -> list[Any]:
    from rich.table import Table

    table = Table(
        "figure", "value", "note", title=f"benchmark {name}" + (" (quick: not to be quoted)" if quick else "")
    )
    for figure, value in result["figures"].items():
        shown = "-" if value is None else f"{value:.4g}"
        table.add_row(figure, shown, result["notes"].get(figure, ""))
    return [table, f"{result['seconds']} s"] + ([] if quick else [f"wrote {RESULTS / name}.json"])
