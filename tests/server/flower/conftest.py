"""A shell script in the place of Flower's command line."""

from __future__ import annotations

import pytest

from server.flower.flower_process import flower_environment


@pytest.fixture
def fake_flwr(tmp_path):
    """Function that installs a shell script as ``flwr`` and returns the keyword arguments of its callers."""

    def install(script: str) -> dict:
        program = tmp_path / "bin" / "flwr"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return {
            "env": flower_environment(tmp_path, job="") | {"PATH": f"{program.parent}:/usr/bin:/bin"},
            "cwd": tmp_path,
        }

    return install
