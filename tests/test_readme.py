"""The README says what is true: its tree, its commands and the files it names exist."""

from __future__ import annotations

import json
import re
import subprocess

import click
import pytest

import fedgraft
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_links_every_page():
    links = {(ROOT / link).resolve() for link in re.findall(r"\]\(([^)#:]+)\)", README)}
    assert set(PAGES) - {ROOT / "README.md"} <= links


def test_files_that_the_pages_name_exist():
    """Every path in backquotes that starts with a folder of the checkout."""
    folders = "|".join(sorted(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."))
    named = {
        (page.name, path)
        for page in PAGES
        for path in re.findall(rf"`((?:{folders})/[a-z0-9_./-]+)`", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 20
    assert [each for each in sorted(named) if not (ROOT / each[1]).exists()] == []


def test_the_two_commands_stand_on_the_first_screen():
    assert README[: README.index("bash scripts/test.sh")].count("\n") < 35


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
    known = commands(click.Group(commands={name: verb.load(name) for name, verb in fedgraft.VERBS.items()}))
    lines = re.findall(r"^fedgraft (.+)$", README, re.MULTILINE)
    shown = {
        line: max((name for name in known if f"{line} ".startswith(f"{name} ")), key=len) for line in lines
    }
    groups = {name.split()[0] for name in known}
    assert {name.split()[0] for name in shown.values()} == groups
    for line, name in shown.items():
        options = {option for parameter in known[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", line)) <= options, line


def quoted_figures(page: str) -> dict[str, dict[str, str]]:
    """Figures in the tables of a page, as shown: benchmark -> figure -> number."""
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| ([\d.]+|-) \|", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE
    )
    found: dict[str, dict[str, str]] = {}
    for benchmark, figure, shown in rows:
        found.setdefault(benchmark, {})[figure] = shown
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_figures_are_those_of_the_benchmarks_results(page):
    quoted = quoted_figures(page)
    assert quoted
    for benchmark, figures in quoted.items():
        results = json.loads((ROOT / "benchmarks/results" / f"{benchmark}.json").read_text())["figures"]
        for figure, shown in figures.items():
            value, decimals = results[figure], len(shown.partition(".")[2])
            # A figure that was not reached is null.
            assert ("-" if value is None else f"{value:.{decimals}f}") == shown, figure


def test_every_figure_of_a_full_run_is_in_the_table():
    results = {
        path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.json")
    }
    shown = {name: set(figures) for name, figures in quoted_figures("docs/benchmarks.md").items()}
    assert shown == {name: set(result["figures"]) for name, result in results.items()}


def test_ci_runs_the_test_command_of_the_readme():
    assert "bash scripts/test.sh" in README
    assert "bash scripts/test.sh" in (ROOT / ".ci/run").read_text()
