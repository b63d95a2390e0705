from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.privacy import runs
from benchmarks.privacy.__main__ import measure, measured
from benchmarks.privacy.settings import CLIPPED, DEFAULT, FULL, Arm, private_keys
from server.privacy.accountant import spent_epsilon


def test_the_quick_run_measures_both_arms_and_goes_on_from_finished_federations(tmp_path, monkeypatch):
    pytest.importorskip("dp_accounting", reason="the extra `privacy` is not installed")
    steps = []
    found = measure(True, lambda stage, done, total: steps.append((done, total)), work=tmp_path)
    assert steps == [(1, 2), (2, 2)]
    assert set(found.notes) <= set(found.figures)
    without, private = found.peers["arms"]
    assert without["epsilon"] is None and without["start"] == private["start"] == found.figures["ppl_start"]
    expected = spent_epsilon(2, noise_multiplier=1.0, usage_noise=0.0, delta=private["delta"])
    assert found.figures["epsilon_noise_1"] == private["epsilon"] == pytest.approx(expected)
    assert 1 < without["perplexity"] < private["perplexity"]
    monkeypatch.setattr(runs, "run_arm", lambda *_: pytest.fail("a finished federation was repeated"))
    again = measure(True, lambda *_: None, work=tmp_path)
    assert again.figures == found.figures and again.seconds == found.seconds


def test_each_arm_has_a_perplexity_and_each_guarantee_an_epsilon():
    result = {"start": 9.0, "perplexity": 5.0, "epsilon": 2.0, "seconds": 3.0}
    arms = {
        Arm(DEFAULT, None, 4): result | {"epsilon": None},
        Arm(CLIPPED, 0.0, 4): result | {"perplexity": 6.0, "epsilon": None},
        Arm("noise_1", 1.0, 4): result | {"perplexity": 7.0},
    }
    found = measured(FULL, arms)
    assert found.figures == {
        "ppl_start": 9.0, "ppl_default": 5.0, "ppl_clipped": 6.0, "ppl_noise_1": 7.0, "epsilon_noise_1": 2.0
    }  # fmt: skip
    assert found.seconds == 9.0 and "no guarantee" in found.notes["ppl_clipped"]


def test_private_arms_have_the_keys_of_the_documented_configuration():
    for arm in FULL.arms:
        values = FULL.config(arm, graph=Path("graph"), folder=Path("run")).values()
        assert values["num-clients"] == arm.clients and values["num-rounds"] == FULL.rounds
        if arm.noise is None:
            assert values["dp-clip-norm"] == 0 and values["optimizer"] == "adamw"
        else:
            expected = dict(private_keys()) | {"dp-noise-multiplier": arm.noise}
            assert {key: values[key] for key in expected} == expected
