"""Failure of a run in which no update of some client was used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NO_ANSWER = "no answer"  # start of the reason for a node that did not answer


class UnusedClients(RuntimeError):
    """No update of some client was used in a completed run; the message names each with the reason of its refusal."""


def check_all_used(summary: Mapping[str, Any], num_clients: int) -> None:
    """Check that at least one update of every client was used.

    Nodes that never answered do not count where ``num_clients`` others were used: one that was killed and started again
    without a key is another node for Flower, beside its former self.

    Args:
        summary: of a completed run, see ``server.rounds.run_observer``.
        num_clients: clients that the run waited for.

    Raises:
        UnusedClients: names the others, and where the model is.
    """
    unused = [client for client in summary["clients"] if client["refused"]]
    enough = len(summary["clients"]) - len(unused) >= num_clients
    if not unused or (enough and all(client["refused"].startswith(NO_ANSWER) for client in unused)):
        return
    named = "; ".join(f"{client['name']}: {client['refused']}" for client in unused)
    saved = f"; the model without them is in {summary['out']}" if summary["out"] else ""
    raise UnusedClients(f"expected a usable update of every client, got none of {named}{saved}")
