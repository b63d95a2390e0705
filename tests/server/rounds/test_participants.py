"""Choice of the nodes of a round."""

from __future__ import annotations

from collections import Counter

import pytest

from configs.run_views import Participation
from server.rounds.participants import choose_participants
from server.state.node_session import NodeSession


def keys(fraction: float = 1.0, least: int = 0, over: float = 1.0) -> Participation:
    return Participation(fraction, least, over, 0.0, 60.0)


def sessions(count: int, **changes) -> dict[int, NodeSession]:
    return {1000 - index: NodeSession(partition=index, **changes) for index in range(count)}


def test_all_nodes_are_asked_unless_a_share_is_configured():
    chosen = choose_participants(sessions(5), 1, keys(), seed=0)
    assert chosen.asked == [1000, 999, 998, 997, 996] and chosen.enough == 5  # in order of the clients


@pytest.mark.parametrize(
    "fraction, least, over, asked, enough",
    [
        (0.25, 0, 1.0, 5, 5),
        (0.01, 0, 1.0, 1, 1),
        (0.25, 8, 1.0, 8, 8),
        (0.5, 0, 1.3, 13, 10),
        (1.0, 0, 1.3, 20, 20),
    ],
)
def test_numbers_follow_from_share_least_number_and_over_provisioning(fraction, least, over, asked, enough):
    chosen = choose_participants(sessions(20), 3, keys(fraction, least, over), seed=0)
    assert (len(set(chosen.asked)), chosen.enough) == (asked, enough)


def test_the_draw_depends_on_seed_round_and_attempt_and_not_on_node_ids():
    def clients(seed: int, server_round: int, attempt: int = 0, shift: int = 0) -> list[int | None]:
        found = {(node * 7919 + shift) % 1009: each for node, each in sessions(20).items()}
        chosen = choose_participants(found, server_round, keys(0.3), seed=seed, attempt=attempt)
        return [found[node].partition for node in chosen.asked]

    assert clients(0, 1) == clients(0, 1, shift=5)
    assert len({tuple(each) for each in (clients(0, 1), clients(1, 1), clients(0, 2), clients(0, 1, 1))}) == 4


def test_every_client_is_drawn_equally_often():
    counts = Counter(
        node
        for number in range(1, 801)
        for node in choose_participants(sessions(8), number, keys(0.25), seed=3).asked
    )
    assert len(counts) == 8 and all(
        150 < count < 250 for count in counts.values()
    )  # 200 expected, 6 deviations 73


def test_resting_nodes_are_asked_only_where_too_few_others_are():
    nodes = sessions(4)
    for node in (1000, 999):
        nodes[node].rests_until = 6
    assert choose_participants(nodes, 5, keys(0.5), seed=0).asked == [998, 997]
    assert choose_participants(nodes, 5, keys(1.0), seed=0).asked == [998, 997]
    chosen = choose_participants(nodes, 5, keys(1.0, least=3), seed=0)
    assert chosen.asked == [1000, 998, 997] and chosen.enough == 3
    for node in (998, 997):
        nodes[node].rests_until = 6
    assert choose_participants(nodes, 5, keys(), seed=0).asked == [1000]  # one at least
    assert len(choose_participants(nodes, 6, keys(), seed=0).asked) == 4
