"""Copy of the project with other Flower apps."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import tomli_w

from benchmarks.support.runner import ROOT
from server.flower.flower_run import stage_app

_PACKAGES = ("/benchmarks/__init__.py", "/benchmarks/support/__init__.py")


@contextmanager
def project_with_apps(server: str, client: str, files: Sequence[str]) -> Iterator[Path]:
    """Temporary copy of the project with other apps.

    Args:
        server: ServerApp as ``module:attribute``.
        client: ClientApp as ``module:attribute``.
        files: patterns of the files that the bundle holds beside those of the project.
    """
    with TemporaryDirectory(prefix="fedgraft-") as folder:
        copy = stage_app(ROOT, Path(folder) / "fedgraft")
        path = copy / "pyproject.toml"
        project = tomllib.loads(path.read_text(encoding="utf-8"))
        app = project["tool"]["flwr"]["app"]
        app["fab-include"] += [*_PACKAGES, *files]
        app["components"] = {"serverapp": server, "clientapp": client}
        path.write_text(tomli_w.dumps(project), encoding="utf-8")
        yield copy
