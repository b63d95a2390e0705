"""Cost of the server by the number of clients, on Flower's simulation engine, and a cost model of it.

Federations of 8 to 50 clients, with models of three sizes and several densities: half of the clients are asked in a
round, an eighth of these answer after the deadline, as many fail, and clients hold all, three quarters or half of the
experts. Bytes, CPU seconds of the server and its peak memory are measured; a cost model is fitted on most federations.
``relative_error_held_out`` is its largest relative error on those that it was not fitted on; ``rss_ratio_50_over_8``
is the server's peak memory with 50 clients over that with 8. Every finished federation is stored in a work folder, and
a benchmark that was interrupted goes on from there. ``--predict`` predicts rounds of Llama-2-7B from the committed
result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.scale.cost_model import Coefficients, Load, fit, predict
from benchmarks.scale.large_units import UNIT, large_rounds
from benchmarks.scale.predictions import prediction_lines, predictions, read_coefficients
from benchmarks.scale.reply_memory import reply_memory
from benchmarks.scale.runs import load_of, load_of_run, quantities, run_or_read, totals
from benchmarks.scale.settings import FULL, QUICK, Point, Settings
from benchmarks.support.runner import (
    Measured,
    OnStep,
    QuickFlag,
    WorkFolder,
    exit_on_bad_input,
    report_resumable,
)
from benchmarks.support.stored import stored, work_folder
from scripts.shared.console import print_result
from scripts.shared.options import JsonFlag

# Figure of each quantity's error, and the quantity.
ERRORS = {
    "bytes_up": "bytes_up",
    "bytes_down": "bytes_down",
    "server_seconds": "server_seconds",
    "rss": "peak_bytes",
}


def measure(quick: bool, on_step: OnStep, *, work: Path | None = None) -> Measured:
    """Run all federations, fit the cost model and compare its predictions.

    Args:
        quick: whether to run two federations of a tiny model.
        on_step: progress callback.
        work: folder of finished federations; None: a temporary one.
    """
    settings = QUICK if quick else FULL
    runs: dict[Point, dict[str, Any]] = {}
    amount = (
        {"units": 1, "clients": 2, "unit_size": 10_000}
        if quick
        else {"units": 8, "clients": 3, "unit_size": UNIT}
    )
    with work_folder(work) as folder:
        memory = stored(folder, {"reply_memory": "of one reply"}, reply_memory)
        large = stored(
            folder, {"large_rounds": amount}, lambda: [_plain(row) for row in large_rounds(**amount)]
        )
        for point in settings.points:
            runs[point] = run_or_read(point, settings, folder)
            on_step("federations", len(runs), len(settings.points))
    return measured(settings, runs, [(Load(**row["load"]), row["seconds"]) for row in large], memory)


def measured(
    settings: Settings,
    runs: Mapping[Point, Mapping[str, Any]],
    large: Sequence[tuple[Load, Mapping[str, float]]],
    memory: dict[str, float],
) -> Measured:
    """Figures and cost model of finished federations.

    Args:
        settings: amounts.
        runs: results.
        large: loads and CPU seconds of ``large_rounds``, on which the model is fitted, too.
        memory: result of ``reply_memory``.
    """
    fitted = [point for point in runs if not point.held_out]
    loads = {point: load_of(point, settings) for point in runs}
    coefficients: Coefficients = fit(
        [*(load_of_run(loads[point], runs[point]) for point in fitted), *(load for load, _ in large)],
        [*(quantities(runs[point], loads[point]) for point in fitted), *(seconds for _, seconds in large)],
    ) | {"reply_memory": memory}
    rows = [_row(point, runs[point], coefficients, loads[point]) for point in runs]
    held_out = [row["errors"] for row in rows if row["held_out"]]
    errors = {name: max(each[name] for each in held_out) for name in ERRORS}
    return Measured(
        figures={
            "relative_error_held_out": max(errors.values()),
            **{f"{name}_error_held_out": error for name, error in errors.items()},
            "rss_ratio_50_over_8": _rss_ratio(rows),
        },
        peers={
            "points": rows,
            "coefficients": coefficients,
            "large_rounds": [_plain(row) for row in large],
            "setting": _amounts(settings),
        },
        notes={
            "relative_error_held_out": "largest of the errors below",
            "server_seconds_error_held_out": "CPU seconds of the server's thread per round",
            "rss_ratio_50_over_8": "peak memory of the server's process, most clients over fewest, one model",
        },
        seconds=sum(run["seconds"] for run in runs.values()),
    )


def _plain(row: tuple[Load, Mapping[str, float]]) -> dict[str, Any]:
    """Load and seconds of a row of ``large_rounds`` as JSON types."""
    return {"load": asdict(row[0]), "seconds": dict(row[1])}


def _row(point: Point, run: Mapping[str, Any], coefficients: Coefficients, load: Load) -> dict[str, Any]:
    """Measured and predicted cost of a point."""
    found, expected = totals(run), predict(coefficients, load)
    return {
        **asdict(point),
        "load": asdict(load),
        "measured": found,
        "predicted": expected,
        "errors": {
            figure: abs(expected[name] - found[name]) / found[name] for figure, name in ERRORS.items()
        },
        "quantities": quantities(run, load),
        "rounds": [{key: row[key] for key in ("round", "bytes_up", "bytes_down")} for row in run["rounds"]],
        "costs": run["costs"],
        "seconds": run["seconds"],
    }


def _rss_ratio(rows: list[dict[str, Any]]) -> float:
    """Peak memory with the most clients over that with the fewest, of the same model and density."""
    most = max(rows, key=lambda row: row["clients"])
    alike = [row for row in rows if (row["size"], row["density"]) == (most["size"], most["density"])]
    return (
        most["measured"]["peak_bytes"] / min(alike, key=lambda row: row["clients"])["measured"]["peak_bytes"]
    )


def _amounts(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in asdict(settings).items() if name != "points"}


def main(
    quick: QuickFlag = False,
    work: WorkFolder = None,
    predict_llama: Annotated[
        bool,
        typer.Option(
            "--predict", help="Predict rounds of Llama-2-7B from the committed result; runs nothing."
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure the server's costs; a full run that was interrupted goes on from its finished federations."""
    if predict_llama:
        _print_predictions(as_json)
    else:
        report_resumable("scale", measure, quick=quick, work=work, as_json=as_json)


def _print_predictions(as_json: bool) -> None:
    with exit_on_bad_input():
        rows = predictions(read_coefficients())
    print_result({"predictions": rows}, as_json=as_json, lines=prediction_lines(rows))


if __name__ == "__main__":
    typer.run(main)
