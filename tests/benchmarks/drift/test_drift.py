from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.drift import runs
from benchmarks.drift.__main__ import measure, measured
from benchmarks.drift.settings import ARMS, FULL, QUICK, WITH, WITHOUT, Job, keys_of
from configs.schema import RunConfig


def test_the_quick_run_measures_every_arm_and_goes_on_from_finished_federations(tmp_path, monkeypatch):
    steps = []
    found = measure(True, lambda stage, done, total: steps.append((done, total)), work=tmp_path)
    assert steps[-1] == (2, 2)
    assert set(found.notes) <= set(found.figures)
    assert found.figures["new_ppl_without"] > 1 and found.figures["old_ppl_ratio_without"] > 0
    run, grown = found.peers["runs"]
    assert (run["arm"], grown["arm"]) == tuple(ARMS) and run["spawned_use"] is None
    assert grown["losses"][: QUICK.switch + 1] == run["losses"][: QUICK.switch + 1]
    assert len(run["losses"]) == QUICK.rounds + 1 and len(run["bytes_up"]) == QUICK.rounds
    assert all(math.isfinite(loss) for loss in run["losses"] + run["old_loss"])
    # The text changes: the loss on the new one is far from that on the old one.
    assert abs(run["losses"][QUICK.switch] - run["losses"][QUICK.switch - 1]) > 0.1
    monkeypatch.setattr(runs, "run_job", lambda *_: pytest.fail("a finished federation was repeated"))
    again = measure(True, lambda *_: None, work=tmp_path)
    assert again.figures == found.figures and again.seconds == found.seconds


def result_of(losses: list[float], **changes) -> dict:
    rounds = len(losses) - 1
    drifted = [False] * 2 + [True] * (rounds - 2)
    return {
        "losses": losses, "bytes_up": [100] * rounds, "drifted": drifted, "old_loss": [2.0, 2.5],
        "edits": {"spawn-expert": 3, "retire-expert": 1, "add-edge": 4}, "spawned_use": 0.5, "seconds": 2.0, **changes,
    }  # fmt: skip


def test_figures_are_means_over_seeds_at_equal_bytes():
    settings = replace(QUICK, switch=2, rounds=5, seeds=(0, 1))
    plain = [3.0, 3.0, 5.0, 4.5, 4.0, 4.0]
    grown = [3.0, 3.0, 5.0, 4.0, 4.0, 3.5]
    results = {
        (WITHOUT, 0): result_of(plain),
        (WITHOUT, 1): result_of(plain, drifted=[False, True, False, True, True]),
        (WITH, 0): result_of(grown, bytes_up=[100, 100, 200, 200, 200]),
        (WITH, 1): result_of(grown, edits={"spawn-expert": 1}, spawned_use=None),
    }
    found = measured(settings, results)
    assert found.peers["recoveries"] == {WITHOUT: [pytest.approx(1.8)] * 2, WITH: pytest.approx([1.8, 0.9])}
    assert found.figures == {
        "recovery_rounds_without": pytest.approx(1.8),
        "new_ppl_without": pytest.approx(math.exp(4.0)),
        "old_ppl_ratio_without": pytest.approx(math.exp(0.5)),
        "detection_delay_without": 0.5,
        "false_alarms_without": 0.5,
        "recovery_rounds_with": pytest.approx(1.35),
        "new_ppl_with": pytest.approx(math.exp(3.5)),
        "old_ppl_ratio_with": pytest.approx(math.exp(0.5)),
        "detection_delay_with": 0.0,
        "false_alarms_with": 0.0,
        "spawns": 2.0,
        "retires": 0.5,
        "spawned_use": None,
    }
    assert found.seconds == 8.0
    results[WITH, 1] = result_of([3.0, 3.0, 5.0, 5.0, 5.0, 5.0])
    assert measured(settings, results).figures["recovery_rounds_with"] is None


def test_the_arms_differ_in_growth_alone():
    plain, grown = (RunConfig(**keys_of(Job(arm, 0, {"seed": 3}))).values() for arm in (WITHOUT, WITH))
    assert {name for name in plain if plain[name] != grown[name]} == {"max-spawned"}
    assert plain["seed"] == 3 and plain["schedule"] == "constant"


def test_rounds_of_the_full_run_end_with_a_checkpoint():
    assert FULL.rounds % FULL.switch == 0 and set(FULL.before).isdisjoint(FULL.after)
