from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, save

from server.state.best_round import BestRound
from server.state.client_drift import ClientDrift
from server.state.drift import Drift
from server.state.early_stop import EarlyStop
from server.state.federation_state import FederationState
from server.state.node_session import NodeSession
from server.state.usage_average import UsageAverage

# Values that decimal text with fewer than 17 digits would change.
STATE = FederationState(
    server_round=7,
    model_version=7,
    graph_version=3,
    stopped="no better \u2013 \n ever",
    usage=UsageAverage(
        [np.triu(np.full((4, 4), 0.1)), np.array([[np.nextafter(1, 2), 1e300], [0.0, 5e-324]])]
    ),
    early_stop=EarlyStop(best=0.1 + 0.2, rounds_without=2),
    best=BestRound(1 / 3, 5, 5, "ab"),
    sessions={
        2**63 + 5: NodeSession(held_version=6, partition=0, accepted_round=7, asked_round=7, examples=0.1),
        3: NodeSession(held_version=0, partition=None, accepted_round=0),
    },
    drift=Drift(
        {
            2: ClientDrift(
                7, 0.1 + 0.2, 1 / 3, None, 1 / 9, [np.array([1 / 7, np.nan]), np.array([1.0])], True
            ),
            0: ClientDrift(seen=3),
        },
        overall=True,
        drifted=[2],
        layers=[0.0, 2 / 3],
    ),
    departed={4: 6},
    updates={0: 5, 4: 2},
)


def bits(state: FederationState) -> list[bytes]:
    arrays = [*state.usage.counts, *state.drift.tensors().values()]
    return [each.tobytes() for each in arrays]


@pytest.mark.parametrize(
    "state", [FederationState(), STATE, replace(STATE, early_stop=EarlyStop(math.inf, 1))]
)
def test_the_state_survives_its_serialization_bit_for_bit(state):
    data = state.to_bytes()
    again = FederationState.from_bytes(data)
    assert again.drift.to_json() == state.drift.to_json()
    bare = {"usage": UsageAverage(), "drift": Drift()}
    assert replace(again, **bare) == replace(state, **bare)
    assert bits(again) == bits(state)
    assert [each.shape for each in again.usage.counts] == [each.shape for each in state.usage.counts]
    assert again.to_bytes() == data


def test_a_restored_state_accumulates_as_the_original():
    counts = [np.full((4, 4), 3), np.full((2, 2), 5)]
    restored, original = (
        FederationState.from_bytes(STATE.to_bytes()),
        FederationState.from_bytes(STATE.to_bytes()),
    )
    original.usage.add(counts, decay=0.75)
    restored = FederationState.from_bytes(restored.to_bytes())
    restored.usage.add(counts, decay=0.75)
    expected = [0.75 * STATE.usage.counts[0] + 0.25 * 3, 0.75 * STATE.usage.counts[1] + 0.25 * 5]
    assert bits(restored) == bits(original)
    assert bits(restored)[:2] == [each.tobytes() for each in expected]


def test_partitions_are_those_of_nodes_with_an_accepted_reply():
    state = FederationState(sessions={4: NodeSession(), 9: NodeSession(held_version=2)})
    assert state.partitions() == {}
    state.sessions[9].accept(1, 5)
    assert state.partitions() == {9: 1}
    assert state.sessions[9] == NodeSession(held_version=2, partition=1, accepted_round=5)


def test_nodes_that_stay_connected_keep_their_sessions_and_those_of_others_are_kept_by_client():
    state = FederationState(server_round=7, model_version=7, departed={5: 2})
    state.sessions = {4: NodeSession(6, 0, 6), 9: NodeSession(7, 1, 5), 10: NodeSession(3)}
    state.connect([4, 11])
    assert state.sessions == {4: NodeSession(6, 0, 6), 11: NodeSession(held_version=7)}
    assert state.departed == {5: 2, 1: 5}
    state.accept(11, 1, examples=12.0)
    assert state.sessions[11] == NodeSession(7, 1, 7, examples=12.0) and state.departed == {5: 2}


def test_states_of_earlier_versions_are_read():
    """Written before clients could return under another node id, and before drift was detected."""
    tensors = load(replace(STATE, drift=Drift()).to_bytes())
    facts = json.loads(tensors["facts"].tobytes())
    del facts["departed"], facts["drift"], facts["updates"]
    earlier = tensors | {"facts": np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)}
    state = FederationState.from_bytes(save(earlier))
    assert state.departed == state.updates == {} and state.drift == Drift() and state.server_round == 7
    assert bits(state) == bits(STATE)[:2]


def test_accepted_updates_are_counted_by_client():
    state = FederationState(sessions={4: NodeSession(), 9: NodeSession()})
    for node, partition in ((4, 1), (9, 0), (4, 1)):
        state.server_round += 1
        state.accept(node, partition)
    assert state.updates == {1: 2, 0: 1}
