from __future__ import annotations

import copy
import math

import pytest
import torch

from benchmarks.support.averaging import Averaging
from benchmarks.support.federated_methods import Client, Schedule
from federated.data.blocks import Blocks
from models.checkpoints.load import load_dense
from tests.support.local_training import local_training

TRAINING = local_training(local_steps=2, schedule="linear")
SCHEDULE = Schedule(TRAINING, rounds=2, batch_size=2, seed=0)


@pytest.fixture
def tiny_llama(tiny_llama_dir):
    return load_dense(str(tiny_llama_dir)).float()


def _client(name: str, model, blocks: int = 4) -> Client:
    generator = torch.Generator().manual_seed(len(name))
    ids = torch.randint(1, model.config.vocab_size, (2 * blocks, 16), generator=generator)
    return Client(name, len(name), Blocks(ids[:blocks], ids[:blocks]), Blocks(ids[blocks:], ids[blocks:]))


def _ffn(model) -> dict:
    return {name: each for name, each in model.named_parameters() if ".mlp." in name}


def test_averaging_one_client_is_training_it(tiny_llama):
    averaged = copy.deepcopy(tiny_llama)
    client = _client("one", averaged)
    method = Averaging(averaged, _ffn(averaged), [client], SCHEDULE)
    before = method.losses()["one"].mean
    traffic = method.train_round(1)
    alone = copy.deepcopy(tiny_llama)
    trainer = Averaging(alone, _ffn(alone), [client], SCHEDULE)
    trainer._train(client, 1)
    for name, parameter in _ffn(averaged).items():
        torch.testing.assert_close(parameter, _ffn(alone)[name], rtol=0, atol=2e-4)
    assert method.losses()["one"].mean != before
    weights = sum(parameter.numel() for parameter in _ffn(averaged).values())
    assert 2 * weights < traffic.up < 2 * weights + 6000 and traffic.down == pytest.approx(
        traffic.up, rel=0.01
    )


def test_averaging_weighs_by_examples(tiny_llama):
    large, small = _client("large", tiny_llama, 6), _client("b", tiny_llama, 2)
    changes = []
    for clients in ([large], [small], [large, small]):
        model = copy.deepcopy(tiny_llama)
        Averaging(model, _ffn(model), clients, SCHEDULE).train_round(1)
        changes.append({name: each - _ffn(tiny_llama)[name] for name, each in _ffn(model).items()})
    for name, both in changes[2].items():
        torch.testing.assert_close(both, 0.75 * changes[0][name] + 0.25 * changes[1][name], rtol=0, atol=3e-4)


def test_the_schedule_spans_all_rounds():
    first, last = SCHEDULE.at(1), SCHEDULE.at(2)
    assert (first.first_step, last.first_step, last.total_steps) == (0, 2, 4)
    assert last.schedule == "linear" and math.isclose(last.learning_rate, 1e-2)
