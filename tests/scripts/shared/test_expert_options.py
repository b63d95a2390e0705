from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from scripts.shared.expert_options import ChoiceOptions
from scripts.shared.verb import verb

LAYOUT = SimpleNamespace(experts_per_layer=[4, 3], shared_per_layer=[0, 0])


@pytest.fixture
def listed(tmp_path) -> Path:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": "1.0", "keep_map": {"0": [0], "1": [0]}}))
    return path


def chosen(*arguments: object, as_json: bool = False):
    """Output of a command that chooses experts, and the warnings that it gave."""
    app = typer.Typer()

    @app.command()
    @verb
    def choose(pick: ChoiceOptions = ChoiceOptions()) -> None:
        (choice,) = pick.choices(LAYOUT, equalize=False, as_json=as_json)
        assert {layer: kept.tolist() for layer, kept in choice.keep_map.items()} == {0: [0], 1: [0]}

    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result, [str(warning.message) for warning in given]


def test_defaults_beside_a_list_do_not_warn(listed):
    assert chosen("--expert-list", listed)[1] == []
    _, warned = chosen("--expert-list", listed, "--n-prune", 1, "--model-wide")
    assert warned == ["--n-prune, --model-wide are ignored beside --expert-list"]
    _, warned = chosen("--expert-list", listed, "--strategy", "bottom")
    assert warned == ["--strategy is ignored beside --expert-list"]


def test_lists_that_were_read_are_printed_where_the_result_is_not(listed):
    text = chosen("--expert-list", listed)[0]
    assert text.stdout.splitlines()[0] == f"Loading expert list from: {listed}" and text.stderr == ""
    strict = chosen("--expert-list", listed, as_json=True)[0]
    assert strict.stdout == "" and "keeps 2 of 7 experts" in strict.stderr
