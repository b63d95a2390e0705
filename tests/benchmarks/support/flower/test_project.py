from __future__ import annotations

import tomllib

from benchmarks.support.flower.project import project_with_apps
from benchmarks.support.runner import ROOT

APPS = ("benchmarks.scale.apps.server_app:app", "benchmarks.scale.apps.client_app:app")


def test_the_copy_has_the_other_apps_and_all_else_of_the_project():
    with project_with_apps(*APPS, ["/benchmarks/scale/__init__.py", "/benchmarks/scale/apps/*.py"]) as copy:
        project = tomllib.loads((copy / "pyproject.toml").read_text())
        assert (copy / "benchmarks" / "scale" / "apps" / "server_app.py").is_file()
        for pattern in project["tool"]["flwr"]["app"]["fab-include"]:
            assert list(copy.glob(pattern.lstrip("/"))), pattern
    assert not copy.exists()
    original = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["flwr"]["app"]["config"] == original["tool"]["flwr"]["app"]["config"]
    assert original["tool"]["flwr"]["app"]["components"]["serverapp"] == "server.app:app"
    assert project["tool"]["flwr"]["app"]["components"] == dict(
        zip(("serverapp", "clientapp"), APPS, strict=True)
    )
