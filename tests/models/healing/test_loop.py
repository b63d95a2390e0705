from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from configs.errors import UserError
from models.healing import loop
from models.healing.loop import TIMED_STEPS, Distillation, blocks_at, distill, rate_at
from models.healing.options import HealingOptions
from models.healing.parameters import select_parameters
from tests.conftest import tiny_llama
from tests.models.healing.test_parameters import graph_with_defaults
from tests.support.tiny_graphs import random_ids

OPTIONS = HealingOptions(steps=8, learning_rate=3e-3, batch_size=3, loss="both", save_seconds=0.0)


def run(options: HealingOptions, *, ids=None, mask=None, **more):
    """Healing of the tiny graph: the trained parameters and the progress."""
    dense = tiny_llama()
    graph = graph_with_defaults()
    ids = random_ids(dense, blocks=8, length=32, seed=1) if ids is None else ids
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    parameters = select_parameters(graph, options.train, rank=options.rank, seed=options.seed)
    progress = distill(Distillation(graph, dense, ids, mask), parameters, options, **more)
    return {name: value.detach().clone() for name, value in parameters.items()}, progress


@pytest.mark.parametrize("loss", ["kl", "hidden", "both"])
@pytest.mark.parametrize("train", ["defaults", "lora", "experts", "all"])
def test_the_loss_falls(loss, train):
    _, progress = run(replace(OPTIONS, loss=loss, train=train, steps=12, batch_size=8))
    assert len(progress.losses) == progress.step == progress.total == 12
    assert progress.losses[-1] < 0.98 * progress.losses[0]
    assert progress.tokens == 12 * 8 * 32 and progress.core_seconds > 0


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("killed_after", [1, 4, 7])
@pytest.mark.parametrize("train", ["experts", "lora"])
def test_a_continued_run_equals_an_uninterrupted_one(tmp_path, killed_after, train):
    options, state = replace(OPTIONS, train=train), tmp_path / "state"
    whole, whole_progress = run(options)

    def kill(done: int, total: int) -> None:
        if done == killed_after + 1:
            raise Killed

    with pytest.raises(Killed):
        run(options, state_file=state, on_step=kill)
    seen: list[int] = []
    continued, progress = run(options, state_file=state, on_step=lambda done, total: seen.append(done))
    assert seen == list(range(killed_after + 1, 9))
    assert progress.losses == whole_progress.losses and progress.tokens == whole_progress.tokens
    assert all(torch.equal(continued[name], value) for name, value in whole.items())


def test_a_state_of_other_settings_is_refused_and_a_damaged_one_ignored(tmp_path):
    state = tmp_path / "state"
    run(OPTIONS, state_file=state, settings={"seed": 1, "data": "a"})
    with pytest.raises(UserError, match="data, graph"):
        run(OPTIONS, state_file=state, settings={"seed": 1, "data": "b", "graph": "c"})
    state.write_bytes(state.read_bytes()[:-1])
    seen: list[int] = []
    run(OPTIONS, state_file=state, settings={}, on_step=lambda done, total: seen.append(done))
    assert seen == list(range(1, 9))


def test_the_number_of_steps_follows_from_the_minutes():
    totals: list[int] = []
    options = replace(OPTIONS, steps=0, minutes=0.02)
    _, progress = run(options, on_step=lambda done, total: totals.append(total))
    assert totals[: TIMED_STEPS - 1] == [0] * (TIMED_STEPS - 1)
    assert set(totals[TIMED_STEPS - 1 :]) == {progress.total} and progress.step == progress.total
    _, shortest = run(replace(options, minutes=1e-9))
    assert shortest.step == TIMED_STEPS


def test_the_rate_is_that_of_the_cosine_of_transformers():
    options = HealingOptions(steps=40, learning_rate=2.0, warmup_steps=4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 4, 40)
    for step in range(40):
        if step >= 4:
            assert rate_at(step, 40, options) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert [rate_at(step, 40, options) for step in range(4)] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert rate_at(20, 0, options) == 2.0 and rate_at(0, 1, options) == 2.0


@pytest.mark.parametrize("count", [1, 5, 8])
def test_every_block_comes_once_per_epoch(count):
    options = HealingOptions(steps=1, batch_size=3)
    steps = [blocks_at(step, count, options) for step in range(2 * count)]
    drawn = torch.cat(steps).tolist()
    epochs = [drawn[start : start + count] for start in range(0, len(drawn), count)]
    assert all(len(step) == 3 for step in steps)
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 1:
        assert len({tuple(epoch) for epoch in epochs}) > 1
        assert (
            drawn
            != torch.cat([blocks_at(s, count, replace(options, seed=1)) for s in range(2 * count)]).tolist()
        )


def test_padding_does_not_train():
    ids = random_ids(tiny_llama(), blocks=2, length=32, seed=1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 20:] = False
    other = ids.clone()
    other[1, 20:] = 0
    options = replace(OPTIONS, steps=2, batch_size=2)
    one, progress = run(options, ids=ids, mask=mask)
    two, _ = run(options, ids=other, mask=mask)
    assert progress.tokens == 2 * (32 + 20)
    assert all(torch.allclose(one[name], value, atol=1e-6) for name, value in two.items())


def test_a_batch_is_the_mean_over_its_tokens_whatever_its_passes(monkeypatch):
    ids = random_ids(tiny_llama(), blocks=3, length=32, seed=1)
    options = replace(OPTIONS, steps=1, batch_size=3, loss="kl")
    first = {}
    for tokens in (32, 64, 512):
        monkeypatch.setattr(loop, "_PASS_TOKENS", tokens)
        first[tokens] = run(options, ids=ids)[1].losses[0]
    singles = [
        run(replace(options, batch_size=1), ids=ids[index : index + 1])[1].losses[0] for index in range(3)
    ]
    assert list(first.values()) == pytest.approx([sum(singles) / 3] * 3, rel=1e-5)


def test_a_rate_too_large_is_an_error():
    with pytest.raises(UserError, match="learning_rate"):
        run(replace(OPTIONS, learning_rate=1e30, steps=8))
