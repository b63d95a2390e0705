from __future__ import annotations

import tomllib

from benchmarks.scale.project import measured_project
from benchmarks.support.runner import ROOT


def test_the_copy_has_the_measured_apps_and_all_else_of_the_project():
    with measured_project() as copy:
        project = tomllib.loads((copy / "pyproject.toml").read_text())
        assert (copy / "benchmarks" / "scale" / "apps" / "server_app.py").is_file()
        for pattern in project["tool"]["flwr"]["app"]["fab-include"]:
            assert list(copy.glob(pattern.lstrip("/"))), pattern
    assert not copy.exists()
    original = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["flwr"]["app"]["config"] == original["tool"]["flwr"]["app"]["config"]
    assert original["tool"]["flwr"]["app"]["components"]["serverapp"] == "server.app:app"
    components = project["tool"]["flwr"]["app"]["components"]
    assert components["serverapp"] == "benchmarks.scale.apps.server_app:app"
