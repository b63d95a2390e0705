from __future__ import annotations

from types import SimpleNamespace

import pytest

from ui.shared.sessions import Sessions
from ui.shared.tab import Tab
from ui.shared.workspace import Workspace


@pytest.mark.parametrize(("running", "told"), [(True, "ending it"), (False, "Nothing runs.")])
def test_the_job_of_a_session_is_canceled_while_it_runs(tmp_path, running, told):
    sessions, canceled = Sessions(tmp_path), []
    tab, request = Tab(Workspace(None, tmp_path), sessions), SimpleNamespace(session_hash="a")
    assert "Nothing runs." in tab.cancel_job(request, "ending it")
    sessions.get("a").job = SimpleNamespace(running=running, cancel=lambda: canceled.append(1))
    assert told in tab.cancel_job(request, "ending it")
    assert canceled == [1] * running
