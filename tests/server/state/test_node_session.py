"""The server's record of one node."""

from __future__ import annotations

from server.state.node_session import NodeSession


def test_a_silent_node_rests_longer_and_longer_and_an_answer_ends_it():
    session, asked, server_round = NodeSession(), [], 1
    while len(asked) < 10:
        if server_round >= session.rests_until:
            asked.append(server_round)
            session.heard(False, server_round)
        server_round += 1
    gaps = [later - earlier for earlier, later in zip(asked, asked[1:], strict=False)]
    assert gaps == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    session.heard(True, 500)
    assert (session.silence, session.rests_until) == (0, 500)
