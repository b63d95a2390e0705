from __future__ import annotations

import sys
from collections.abc import Iterator

import click
import pytest

from scripts.shared.verb_group import Verb, VerbGroup

MODULE = '''
import typer

def greet(name: str, *, loud: bool = False) -> None:
    """Print a greeting. The rest."""
    print(name.upper() if loud else name)

group = typer.Typer(help="Several commands.")

@group.command()
def one() -> None:
    """The first."""
    print("one")

@group.command()
def two() -> None:
    """The second."""
    print("two")
'''


@pytest.fixture
def app(tmp_path, monkeypatch) -> Iterator[VerbGroup]:
    (tmp_path / "verbs_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield VerbGroup(
        {
            "greet": Verb("verbs_of_a_test:greet", "Talking", "Print a greeting."),
            "several": Verb("verbs_of_a_test:group", "Counting", "Several commands."),
        },
        name="app",
        no_args_is_help=True,
    )
    sys.modules.pop("verbs_of_a_test", None)


def test_help_is_printed_from_the_table_without_an_import(app, capsys):
    app(args=["--help"], standalone_mode=False)
    out = capsys.readouterr().out
    assert "Talking" in out and "Print a greeting." in out and "Counting" in out and "several" in out
    assert "verbs_of_a_test" not in sys.modules


def test_a_function_runs_with_its_options(app, capsys):
    app(args=["greet", "ada", "--loud"], standalone_mode=False)
    assert capsys.readouterr().out == "ADA\n"


def test_sub_commands_run(app, capsys):
    app(args=["several", "two"], standalone_mode=False)
    assert capsys.readouterr().out == "two\n"


def test_help_of_a_verb_is_its_own(app, capsys):
    app(args=["greet", "--help"], standalone_mode=False)
    out = capsys.readouterr().out
    assert "The rest." in out and "--loud" in out


def test_an_unknown_verb_is_refused_with_the_nearest(app):
    with pytest.raises(click.UsageError, match="'gret'.*'greet'"):
        app(args=["gret"], standalone_mode=False)


def test_a_verb_with_sub_commands_is_a_group(app):
    assert isinstance(app.verbs["several"].load("several"), click.Group)
    assert not isinstance(app.verbs["greet"].load("greet"), click.Group)
