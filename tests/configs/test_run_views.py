from __future__ import annotations

from dataclasses import MISSING, fields
from typing import get_type_hints

import pytest

from configs.run_views import (
    Adapters,
    Aggregation,
    Participation,
    Privacy,
    Rewiring,
    Training,
    Upload,
    view_of,
)
from configs.schema import RunConfig

VIEWS = (Training, Adapters, Upload, Aggregation, Rewiring, Privacy, Participation)


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_holds_keys_of_the_run_with_their_types_and_no_defaults(view):
    run, own = get_type_hints(RunConfig), get_type_hints(view)
    for field in fields(view):
        assert own[field.name] == run[field.name], field.name
        assert field.default is MISSING and field.default_factory is MISSING, field.name


def test_views_carry_the_values_of_the_run():
    config = RunConfig(local_steps=7, lora_rank=3, density=0.25, schedule="cosine")
    assert (config.training.local_steps, config.training.schedule) == (7, "cosine")
    assert config.adapters.lora_rank == 3 and config.upload.density == 0.25
    server = RunConfig(server_learning_rate=0.5, combine="mean", merge_every=4)
    assert (server.aggregation.server_learning_rate, server.aggregation.combine) == (0.5, "mean")
    assert (server.rewiring.merge_every, server.rewiring.rho_max) == (4, RunConfig().rho_max)
    assert (view_of(Training, config), view_of(Adapters, config)) == (config.training, config.adapters)


def test_an_upload_knows_its_bytes_and_its_weighting():
    assert RunConfig().upload.max_bytes == 0 and not RunConfig().upload.unbiased
    assert RunConfig(upload_budget_mb=0.25).upload.max_bytes == 250_000
    assert RunConfig(combine="horvitz-thompson").upload.unbiased


@pytest.mark.parametrize(
    ("fraction", "least", "connected", "wanted"),
    [(1.0, 0, 5, 5), (0.5, 0, 5, 3), (0.1, 0, 5, 1), (0.1, 2, 5, 2), (0.1, 9, 5, 5), (1.0, 0, 0, 1)],
)
def test_the_updates_of_a_round_are_a_share_of_the_connected_clients(fraction, least, connected, wanted):
    participation = RunConfig(fraction_train=fraction, min_clients=least, num_clients=9).participation
    assert participation.wanted(connected) == wanted


@pytest.mark.parametrize(
    ("clip", "usage", "on", "counts"), [(0, 0, False, True), (1, 0, True, False), (1, 1, True, True)]
)
def test_clients_report_usage_unless_it_is_private_and_without_noise(clip, usage, on, counts):
    privacy = Privacy(clip, 1.0, usage, 1e-5, 0.0)
    assert (privacy.on, privacy.counts_usage) == (on, counts)
