from __future__ import annotations

import pytest
import torch
from torch.optim import AdamW

from configs.errors import UserError
from models.healing.state import Progress, load_state, save_state


def trained(steps: int) -> tuple[dict[str, torch.nn.Parameter], AdamW]:
    """Two parameters, one of which has a gradient, after some steps of Adam."""
    parameters = {name: torch.nn.Parameter(torch.arange(4.0)) for name in ("a", "b")}
    optimizer = AdamW(parameters.values(), lr=0.1)
    for _ in range(steps):
        parameters["a"].grad = parameters["a"].detach().sin()
        optimizer.step()
    return parameters, optimizer


def test_parameters_moments_and_progress_are_restored_bit_for_bit(tmp_path):
    path, progress = tmp_path / "state", Progress(3, 9, 100, [0.1, 1 / 3, 2.0], 1.5, 2.5)
    parameters, optimizer = trained(3)
    save_state(path, parameters, optimizer, progress, {"seed": 1})
    others, fresh = trained(0)
    assert load_state(path, others, fresh, {"seed": 1}) == progress
    for name, value in parameters.items():
        assert torch.equal(value, others[name])
        mine, theirs = optimizer.state.get(value, {}), fresh.state.get(others[name], {})
        assert mine.keys() == theirs.keys() == ({"step", "exp_avg", "exp_avg_sq"} if name == "a" else set())
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_no_state_leaves_everything_as_it_is(tmp_path):
    parameters, optimizer = trained(1)
    before = {name: value.detach().clone() for name, value in parameters.items()}
    assert load_state(tmp_path / "none", parameters, optimizer, {}) == Progress()
    assert all(torch.equal(value, before[name]) for name, value in parameters.items())


def test_other_settings_are_named(tmp_path):
    parameters, optimizer = trained(1)
    save_state(tmp_path / "state", parameters, optimizer, Progress(), {"seed": 1, "rank": 2})
    with pytest.raises(UserError, match="another rank, steps"):
        load_state(tmp_path / "state", parameters, optimizer, {"seed": 1, "steps": 2})
