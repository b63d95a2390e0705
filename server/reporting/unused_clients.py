"""Failure of a run in which no update of some client was used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class UnusedClients(RuntimeError):
    """No update of some client was used in a completed run; the message names each with the reason of its refusal."""


def check_all_used(summary: Mapping[str, Any]) -> None:
    """Check that at least one update of every client was used.

    Args:
        summary: of a completed run, see ``server.rounds.run_observer``.

    Raises:
        UnusedClients: names the others, and where the model is.
    """
    unused = [client for client in summary["clients"] if client["refused"]]
    if not unused:
        return
    named = "; ".join(f"{client['name']}: {client['refused']}" for client in unused)
    saved = f"; the model without them is in {summary['out']}" if summary["out"] else ""
    raise UnusedClients(f"expected a usable update of every client, got none of {named}{saved}")
