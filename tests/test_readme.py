"""The README says what is true: its tree, its commands and the files it names exist."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from typer.main import get_command

import fedgraft
from tests.support.paths import ROOT

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


def commands(group, prefix="") -> dict:
    """Every command by its full name, those of groups, too."""
    found: dict = {}
    for name, command in group.commands.items():
        found |= (
            commands(command, f"{prefix}{name} ")
            if hasattr(command, "commands")
            else {prefix + name: command}
        )
    return found


def test_commands_and_options_exist():
    known = commands(get_command(fedgraft.app))
    lines = re.findall(r"^fedgraft (.+)$", README, re.MULTILINE)
    shown = {
        line: max((name for name in known if f"{line} ".startswith(f"{name} ")), key=len) for line in lines
    }
    groups = {name.split()[0] for name in known}
    assert {name.split()[0] for name in shown.values()} == groups
    for line, name in shown.items():
        options = {option for parameter in known[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", line)) <= options, line


def test_figures_are_those_of_the_benchmarks_results():
    quoted = {}
    for benchmark, figure, shown in re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| ([\d.]+|-) \|", README, re.MULTILINE
    ):
        value = json.loads((ROOT / "benchmarks/results" / f"{benchmark}.json").read_text())["figures"][figure]
        decimals = len(shown.partition(".")[2])
        # A figure that was not reached is null.
        assert ("-" if value is None else f"{value:.{decimals}f}") == shown, figure
        quoted.setdefault(benchmark, set()).add(figure)
    results = {
        path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.json")
    }
    assert quoted == {name: set(result["figures"]) for name, result in results.items()}


def test_ci_runs_the_test_command_of_the_readme():
    assert "bash scripts/test.sh" in README
    assert "bash scripts/test.sh" in (ROOT / ".ci/run").read_text()
