"""The README says what is true: its tree, its commands and the files it names exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

import fedgraft

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _tracked() -> list[str]:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.split()


def test_tree_lists_every_folder_and_command():
    block = re.search(r"```text\n(.*?)```", README, re.DOTALL).group(1)
    named = {line.split()[0] for line in block.splitlines() if line.strip()}
    tracked = _tracked()
    folders = {path.split("/")[0] + "/" for path in tracked if "/" in path and not path.startswith(".")}
    assert named == folders | {"fedgraft.py"}


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_commands_and_options_exist():
    command = get_command(fedgraft.app)
    shown = re.findall(r"^fedgraft (\w+)(.*)$", README, re.MULTILINE)
    assert {verb for verb, _ in shown} == set(command.commands)
    for verb, rest in shown:
        known = {option for parameter in command.commands[verb].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known


def test_ci_runs_the_test_command_of_the_readme():
    assert "bash scripts/test.sh" in README
    assert "bash scripts/test.sh" in (ROOT / ".ci/run").read_text()
