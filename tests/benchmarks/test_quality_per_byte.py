from __future__ import annotations

import math

import pytest

from benchmarks.quality_per_byte import measure
from benchmarks.support import federation_run
from benchmarks.support.quality.settings import QUICK
from clients.client_app import app
from server.app import run_federation

METHODS = ("dense", "fedit", "ours", "half dense", "half ours")
FIGURES = {
    "uplink_ratio_dense",
    "total_ratio_dense",
    "uplink_ratio_half_active",
    "uplink_ratio_fedit",
    "worst_client_ratio",
}


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """Calls that the in-process federations make of the server app and of the client app."""
    counts = {"server": 0, "client": 0}

    def counted(kind, function):
        def call(*args, **kwargs):
            counts[kind] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(federation_run, "run_federation", counted("server", run_federation))
    monkeypatch.setattr(federation_run, "app", counted("client", app))
    return counts


def test_the_quick_run_measures_every_method(calls):
    steps = []
    measured = measure(True, lambda stage, done, total: steps.append((done, total)))
    assert set(measured.figures) == set(measured.notes) == FIGURES
    assert all(value is None or 0 < value < math.inf for value in measured.figures.values())
    assert steps[-1][0] == steps[-1][1]
    assert measured.notes["worst_client_ratio"] == "mean over seeds (1); learning rates of an earlier search"
    runs = measured.peers["runs"]
    for method in METHODS:
        seeds = QUICK.half_seeds if method.startswith("half") else QUICK.seeds
        assert [run["seed"] for run in runs[method]] == list(seeds)
        for run in runs[method]:
            first, last = run["trajectory"][0], run["trajectory"][-1]
            assert first["up"] == first["down"] == 0
            assert min(last["up"], last["down"]) > 0
            assert all(math.isfinite(loss) for loss in last["losses"].values())
    assert runs["fedit"][0]["trajectory"][-1]["up"] < runs["dense"][0]["trajectory"][-1]["up"]

    ours = len(runs["ours"]) + len(runs["half ours"])
    clients = len(QUICK.domains) + 1
    # In each round every client trains; in the end every client evaluates.
    assert calls == {"server": ours, "client": ours * clients * (QUICK.most_rounds + 1)}
    assert measured.seconds == pytest.approx(sum(run["seconds"] for name in METHODS for run in runs[name]))
