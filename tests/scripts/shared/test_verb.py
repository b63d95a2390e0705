from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import click
import pytest
import typer
from typer.main import get_command

from configs.choices import Metric
from configs.errors import UserError
from scripts.shared.verb import given_options, verb


@dataclass(frozen=True)
class Sizes:
    batch_size: Annotated[int, typer.Option(min=1, help="Blocks.")] = 8
    names: Annotated[list[str] | None, typer.Option("--name", help="Names.")] = None


@dataclass(frozen=True)
class Scored(Sizes):
    out: Annotated[str, typer.Option("--out", "--output", help="Result.")] = ""
    metric: Annotated[Metric, typer.Option(help="Measure.")] = Metric.REAP


@verb
def measure(
    model: Annotated[str, typer.Option(help="Model.")],
    scored: Scored = Scored(batch_size=3),
    fast: bool = False,
) -> None:
    """Measure."""
    calls.append((model, scored, fast, given_options()))


calls: list = []


def run(*arguments: str):
    app = typer.Typer()
    app.command()(measure)
    calls.clear()
    get_command(app).main(list(arguments), standalone_mode=False)
    return calls[0]


def test_fields_become_options_with_the_defaults_of_the_parameter():
    names = list(inspect.signature(measure).parameters)
    assert names == ["model", "batch_size", "names", "out", "metric", "fast", "config"]
    assert run("--model", "m") == ("m", Scored(batch_size=3), False, {"model"})
    given = run(
        "--model", "m", "--batch-size", "5", "--name", "a", "--name", "b", "--output", "o", "--metric", "ean"
    )
    assert given[1] == Scored(batch_size=5, names=["a", "b"], out="o", metric=Metric.EAN)
    assert given[3] == {"model", "batch_size", "names", "out", "metric"}


def test_choices_and_bounds_are_checked_while_parsing():
    with pytest.raises(click.BadParameter, match="'foo' is not one of 'reap', 'ean'"):
        run("--model", "m", "--metric", "foo")
    with pytest.raises(click.BadParameter, match="x>=1"):
        run("--model", "m", "--batch-size", "0")


def test_a_file_gives_options_below_the_command_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('model = "m"\nbatch-size = 4\nname = "a"\nmetric = "freq"\nfast = true\n')
    given = run("--config", str(path), "--metric", "ean")
    assert given[:3] == ("m", Scored(batch_size=4, names=["a"], metric=Metric.EAN), True)
    assert given[3] == {"model", "batch_size", "names", "metric", "fast", "config"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_size = 4", "did you mean 'batch-size'"),
        ("config = 1", "got 'config'"),
        ("help = true", "got 'help'"),
    ],
)
def test_an_unknown_key_of_the_file_is_refused(tmp_path, text, words):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(UserError, match=words):
        run("--config", str(tmp_path / "run.toml"), "--model", "m")


def test_a_value_of_the_file_is_checked_like_one_of_the_command_line(tmp_path):
    (tmp_path / "run.toml").write_text("batch-size = 0")
    with pytest.raises(click.BadParameter, match="0 is not in the range"):
        run("--config", str(tmp_path / "run.toml"), "--model", "m")


def test_outside_of_a_command_no_option_is_given():
    assert given_options() == set()
