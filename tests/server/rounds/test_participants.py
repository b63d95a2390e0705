"""Choice of the nodes of a round."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from configs.run_views import Participation
from federated.selection.systematic import inclusion_probabilities
from server.rounds.participants import choose_participants, sampling_sizes
from server.state.node_session import NodeSession


def keys(
    fraction: float = 1.0, least: int = 0, over: float = 1.0, weights: str = "uniform", cap: float = 2.0
) -> Participation:
    return Participation(fraction, weights, cap, least, over, 0.0, 60.0)


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


def with_examples(claims: list[float]) -> dict[int, NodeSession]:
    return {1000 - index: NodeSession(partition=index, examples=claim) for index, claim in enumerate(claims)}


@pytest.mark.parametrize(
    ("claims", "cap", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], 0.0, [1, 2, 3, 4]),
        (
            [10.0, 12.0, 30.0, 2.0**40],
            2.0,
            [10, 12, 24, 24],
        ),  # against a claim that draws a client in each round
        ([3.0, 5.0, 0.0], 0.0, [3, 5, 4]),  # of a client that has not answered: the mean
        ([0.0, 0.0], 2.0, [1, 1]),
    ],
)
def test_sizes_by_examples_are_capped_claims(claims, cap, expected):
    sizes = sampling_sizes(with_examples(claims), 1, keys(0.5, weights="examples", cap=cap))
    assert list(sizes.values()) == expected


def test_sizes_by_staleness_are_rounds_since_the_last_request_and_at_least_one():
    nodes = {node: NodeSession(asked_round=node) for node in (0, 3, 6, 7)}
    assert sampling_sizes(nodes, 7, keys(0.5, weights="staleness")) == {0: 7, 3: 4, 6: 1, 7: 1}
    assert sampling_sizes(nodes, 7, keys(0.5)) is None


@pytest.mark.parametrize("over, asked", [(1.0, 2), (1.5, 3)])
def test_by_examples_a_client_is_asked_as_often_as_its_size_says_and_weighs_the_inverse(over, asked):
    claims, values = [4.0, 8.0, 12.0, 16.0, 40.0, 20.0], np.array([1.0, -2.0, 3.0, 0.5, 7.0, -1.0])
    nodes, drawing = with_examples(claims), keys(1 / 3, over=over, weights="examples", cap=0.0)
    expected = inclusion_probabilities(dict(zip(nodes, claims, strict=True)), asked)
    counts: Counter[int] = Counter()
    estimates, total = [], 3000
    for number in range(total):
        chosen = choose_participants(nodes, number, drawing, seed=7)
        assert (len(chosen.asked), chosen.enough) == (asked, 2)
        assert chosen.inclusion == {node: pytest.approx(expected[node]) for node in chosen.inclusion}
        assert set(chosen.inclusion) == set(chosen.asked)
        counts.update(chosen.asked)
        weights = {node: nodes[node].examples / share for node, share in chosen.inclusion.items()}
        estimates.append(sum(weight * values[1000 - node] for node, weight in weights.items()))
    for node, probability in expected.items():
        error = (probability * (1 - probability) / total) ** 0.5
        assert abs(counts[node] / total - probability) < 4 * error + 1e-9
    # Weighted by examples over probability, the sum over the draw estimates that over all clients.
    error = np.std(estimates) / total**0.5
    assert abs(np.mean(estimates) - np.dot(claims, values)) < 4 * error


def test_which_pairs_are_drawn_by_examples_is_up_to_chance():
    nodes = with_examples([1.0] * 6)
    drawing = keys(1 / 3, weights="examples")
    pairs = Counter(tuple(choose_participants(nodes, number, drawing, seed=1).asked) for number in range(600))
    assert len(pairs) == 15 and min(pairs.values()) > 15  # 40 expected


def staleness_run(weights: str, rounds: int) -> tuple[Counter, list[int]]:
    """How often each of 8 clients was asked, two in each round, and the gaps between its requests."""
    counts: Counter[int] = Counter()
    nodes, gaps = sessions(8), []
    for number in range(1, rounds + 1):
        for node in choose_participants(nodes, number, keys(0.25, weights=weights), seed=5).asked:
            counts[node] += 1
            gaps.append(number - nodes[node].asked_round)
            nodes[node].asked_round = number
    return counts, gaps[8:]


def test_by_staleness_all_are_asked_equally_often_with_more_even_gaps():
    counts, gaps = staleness_run("staleness", 800)
    _, uniform = staleness_run("uniform", 800)
    assert len(counts) == 8 and all(150 < count < 250 for count in counts.values())  # 200 expected
    assert np.std(gaps) < 0.75 * np.std(uniform) and max(gaps) < max(uniform)
    nodes = {node: NodeSession(partition=node, asked_round=asked) for node, asked in enumerate((9, 8, 6, 3))}
    drawn = Counter(
        node
        for seed in range(2000)
        for node in choose_participants(nodes, 10, keys(0.25, weights="staleness"), seed=seed).asked
    )
    shares = [drawn[node] / 2000 for node in range(4)]
    assert shares == pytest.approx([1 / 14, 2 / 14, 4 / 14, 7 / 14], abs=0.045)  # 4 deviations


def test_only_draws_by_examples_change_the_weights():
    for weights in ("uniform", "staleness"):
        assert choose_participants(sessions(8), 3, keys(0.5, weights=weights), seed=0).inclusion == {}
    nodes = with_examples([4.0, 4.0, 4.0])
    nodes[1000].rests_until = 9
    chosen = choose_participants(nodes, 3, keys(0.5, least=3, weights="examples"), seed=0)
    # The resting node is asked for want of others, not drawn.
    assert chosen.asked == [1000, 999, 998] and chosen.inclusion == {999: 1.0, 998: 1.0}
