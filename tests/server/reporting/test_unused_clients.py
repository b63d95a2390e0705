from __future__ import annotations

import pytest

from server.reporting.unused_clients import UnusedClients, check_all_used


def summary(*refused: str | None, out: str = "") -> dict:
    return {"clients": [{"name": f"c{n}", "refused": reason} for n, reason in enumerate(refused)], "out": out}


def test_a_run_that_used_every_client_passes():
    check_all_used(summary(None, None, out="/out"), 2)


def test_every_unused_client_is_named_with_its_reason_and_the_model_with_its_folder():
    with pytest.raises(UnusedClients) as error:
        check_all_used(summary("disk full", None, "away", out="/out"), 3)
    assert str(error.value).endswith("got none of c0: disk full; c2: away; the model without them is in /out")
    with pytest.raises(UnusedClients, match="c0: away$"):
        check_all_used(summary("away"), 1)


def test_a_silent_node_is_no_failure_where_all_clients_were_used():
    silent = "no answer within 30 s"
    check_all_used(summary(None, silent, None), 2)
    for refused, num_clients in (((None, silent), 2), ((None, silent, "disk full"), 1)):
        with pytest.raises(UnusedClients, match="c1: no answer within 30 s"):
            check_all_used(summary(*refused), num_clients)
