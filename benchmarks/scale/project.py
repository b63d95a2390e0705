"""Copy of the project whose two Flower apps are those of this benchmark."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import tomli_w

from benchmarks.support.runner import ROOT
from server.flower.flower_run import stage_app

_FILES = (
    "/benchmarks/__init__.py",
    "/benchmarks/scale/__init__.py",
    "/benchmarks/scale/apps/*.py",
    "/benchmarks/support/__init__.py",
    "/benchmarks/support/process_peak.py",
)


@contextmanager
def measured_project() -> Iterator[Path]:
    """Temporary copy of the project with the apps of ``benchmarks.scale.apps``, for Flower's simulation engine."""
    with TemporaryDirectory(prefix="fedgraft-") as folder:
        copy = stage_app(ROOT, Path(folder) / "fedgraft")
        path = copy / "pyproject.toml"
        project = tomllib.loads(path.read_text(encoding="utf-8"))
        app = project["tool"]["flwr"]["app"]
        app["fab-include"] += _FILES
        app["components"] = {
            "serverapp": "benchmarks.scale.apps.server_app:app",
            "clientapp": "benchmarks.scale.apps.client_app:app",
        }
        path.write_text(tomli_w.dumps(project), encoding="utf-8")
        yield copy
