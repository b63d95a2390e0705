from __future__ import annotations

import json

import numpy as np
import pytest

from configs.schema import RunConfig
from models.runtime.perplexity import LossSum
from server.state.client_drift import ClientDrift, Observation
from server.state.drift import RECENT, Drift

KEYS = RunConfig().drift_detection
VISITS = (np.array([3.0, 1.0, np.nan]), np.array([1.0, 1.0]))


def report(partition: int, loss: float = 4.0, visits=VISITS) -> Observation:
    return Observation(partition, LossSum(loss * 10, 10), visits)


def add_rounds(drift: Drift, *rounds: dict[int, float], start: int = 1) -> Drift:
    """Add rounds of losses by client."""
    for server_round, losses in enumerate(rounds, start):
        drift.add([report(each, loss) for each, loss in losses.items()], server_round, KEYS)
    return drift


def losses(clients: int, *higher: int) -> dict[int, float]:
    """A loss of 4 nats for each client, of 5 for those named."""
    return {each: 5.0 if each in higher else 4.0 for each in range(clients)}


@pytest.mark.parametrize(
    ("clients", "drifted", "overall"),
    [(1, 1, True), (2, 1, False), (2, 2, True), (4, 1, False), (4, 2, True), (8, 1, False), (8, 2, True),
     (20, 4, False), (20, 5, True)],
)  # fmt: skip
def test_a_quarter_of_the_clients_and_at_least_two_make_it_the_federations(clients, drifted, overall):
    drift = add_rounds(Drift(), losses(clients), losses(clients, *range(drifted)))
    assert drift.drifted == list(range(drifted)) and drift.overall == overall


@pytest.mark.parametrize("clients", [3, 8])
def test_a_hostile_client_alone_makes_no_drift_of_the_federation(clients):
    drift, forged = Drift(), 0.0
    for server_round in range(1, 30):
        forged = 10_000.0 - forged  # in turn the largest loss that is accepted, and none
        mass = np.eye(3)[server_round % 3] * 1e9
        honest = [report(each, 4.0, [np.full(3, 5.0)]) for each in range(1, clients)]
        drift.add([report(0, forged, [mass]), *honest], server_round, KEYS)
        assert not drift.overall and set(drift.drifted) <= {0}
        assert drift.layers == [0.0]
    assert drift.drifted == [0]


def test_absent_clients_keep_their_statistics_and_count_for_three_rounds():
    drift = add_rounds(Drift(), losses(8), losses(8), {0: 5.0})
    alone = drift.clients[5]
    assert (alone.seen, alone.expected) == (2, 4.0) and drift.drifted == [0] and not drift.overall
    add_rounds(drift, {1: 5.0}, start=4)
    assert drift.drifted == [0, 1] and drift.overall  # two of the eight that were heard in rounds 2 to 4
    add_rounds(drift, {5: 4.0}, start=2 + RECENT)
    assert drift.drifted == [0, 1] and drift.clients[0].seen == 3
    add_rounds(drift, {5: 4.0}, start=3 + RECENT)
    assert drift.drifted == [1] and not drift.overall  # one of two
    add_rounds(drift, {0: 4.0}, start=9)
    assert drift.clients[0].expected == pytest.approx(4.25)


def test_layers_are_means_over_the_clients_of_the_round_without_the_largest_fifth():
    drift, before = Drift(), [np.array([1.0, 1.0]), np.array([2.0, 1.0])]
    drift.add([report(each, visits=before) for each in range(4)], 1, KEYS)
    assert drift.layers == [0.0, 0.0]
    moved = [np.array([1.0, 0.0]), np.array([2.0, 1.0])]
    drift.add([report(each, visits=moved if each < 2 else before) for each in range(4)], 2, KEYS)
    one = drift.clients[0].divergence * 2
    assert one > 0.3 and drift.layers == pytest.approx([one / 3, 0.0])
    drift.add([report(0, visits=())], 3, KEYS)
    assert drift.layers == []


def test_restart_withdraws_every_alarm():
    drift = add_rounds(Drift(), losses(4), losses(4, 0, 1, 2))
    assert drift.overall
    drift.restart()
    assert drift == Drift({each: ClientDrift(seen=2) for each in range(4)})
    assert not add_rounds(drift, losses(4, 0, 1, 2, 3), start=3).overall


def stored(drift: Drift) -> Drift:
    return Drift.from_parts(json.loads(json.dumps(drift.to_json())), drift.tensors())


def facts(drift: Drift) -> tuple[dict, dict[str, bytes]]:
    return drift.to_json(), {name: array.tobytes() for name, array in drift.tensors().items()}


def test_a_stored_state_is_equal_and_decides_as_the_original():
    drift = add_rounds(Drift(), losses(3), losses(3, 1), {0: 4.1, 2: 1 / 3})
    again = stored(drift)
    assert facts(again) == facts(drift) and set(drift.tensors()) >= {"drift.2.0", "drift.2.1"}
    for server_round in (4, 5):
        for each in (drift, again):
            each.add([report(1, 4.3, [np.array([1.0, 2.0, 3.0]), VISITS[1]])], server_round, KEYS)
        again = stored(again)
        assert facts(again) == facts(drift)


def test_a_state_without_any_is_that_of_a_new_run():
    assert Drift.from_parts({}, {}) == Drift() == stored(Drift())
