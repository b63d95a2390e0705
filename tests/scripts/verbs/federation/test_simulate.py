from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from benchmarks.support.resume.killed_run import weights_hash
from configs.errors import UserError
from configs.schema import load_run_config
from scripts.verbs.federation.simulate import PROJECT
from server.app import run_federation
from server.flower.flower_process import RunFailed, job_processes, stop_job
from server.flower.in_process_grid import RUN_ID
from server.state.journal import STATE_FOLDER
from server.state.run_lock import DRIVER_LOCK, SERVER_LOCK, check_unused, holding
from server.state.settings import Settings
from server.state.stop_request import request_stop
from tests.support.command import assert_refused, run, tree
from tests.support.flower.apps import UNREACHABLE_PROXY
from tests.support.run_summaries import SUMMARY
from tests.support.tiny_federation import (
    TinyGrid,
    assert_run_succeeded,
    run_values,
    save_tiny_graph,
    write_texts,
)

ALONE = (("one", "train"), ("pair", "train"), ("pair", "valid"))


@pytest.fixture(scope="module")
def graph(tmp_path_factory, tiny_tokenizer) -> Path:
    return save_tiny_graph(tmp_path_factory.mktemp("simulate") / "graph", tiny_tokenizer, visits=2)


@pytest.fixture
def place(tmp_path, monkeypatch, graph, tiny_llama_dir) -> Path:
    """A working directory with a graph, a dense model and texts."""
    shutil.copytree(graph, tmp_path / "graph")
    shutil.copytree(tiny_llama_dir, tmp_path / "dense")
    shutil.copytree(graph, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    write_texts(tmp_path / "texts")
    (tmp_path / "empty.txt").write_text(" \n")
    alone = [{"domain": name, "split": split, "text": "a cat"} for name, split in ALONE]
    (tmp_path / "alone.jsonl").write_text("\n".join(map(json.dumps, alone)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("precious")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def simulations(monkeypatch) -> list[tuple[Path, dict]]:
    """The calls that would start Flower; each leaves a summary."""
    calls = []

    def simulate(project: Path, **options) -> None:
        calls.append((project, options))
        options["log_dir"].mkdir(parents=True, exist_ok=True)
        (options["log_dir"] / "summary.json").write_text(json.dumps(SUMMARY))

    monkeypatch.setattr("server.flower.simulation.run_simulation", simulate)
    return calls


COMMAND = (
    "simulate", "--graph", "graph", "--data", "texts/letters.jsonl", "--data", "texts/digits.jsonl",
    "--set", "block-size=32",
)  # fmt: skip

BAD_INPUT = {
    "no client": (("--clients", "0"), ["num-clients", "1", "got 0"]),
    "no round": (("--rounds", "0"), ["num-rounds", "1", "got 0"]),
    "more clients than domains": (("--clients", "3"), ["clients", "domains (2)", "got 3"]),
    "a client without documents": (("--data", "alone.jsonl", "--clients", "4"), ["client 'one'", "got 1 and 0"]),
    "too few documents": (("--partition", "iid", "--clients", "21"), ["two documents a client", "got 40"]),
    "empty data": (("--data", "empty.txt"), ["empty.txt", "none that holds any text"]),
    "no such data": (("--data", "nowhere.txt"), ["nowhere.txt"]),
    "empty server data": (("--set", "server-data=empty.txt"), ["empty.txt"]),
    "budgets above E": (("--budgets", "4,5"), ["budgets", "4 experts", "got 5"]),
    "budgets for others": (("--budgets", "4"), ["budgets", "num-clients is 2"]),
    "k above E": (("--set", "experts-per-token=5"), ["experts-per-token", "4 experts", "got 5"]),
    "unknown key": (("--set", "rho_maximum=3"), ["rho_maximum", "did you mean 'rho-max'?"]),
    "value out of range": (("--set", "density=2"), ["density", "got 2"]),
    "value of another type": (("--set", "rho-max=many"), ["rho-max", "'many'"]),
    "no assignment": (("--set", "density"), ["key=value", "'density'"]),
    "unknown partition": (("--partition", "domains"), ["partition", "did you mean 'domain'?"]),
    "no such file": (("--config", "none.toml"), ["none.toml"]),
    "blocks beyond the context": (("--set", "block-size=129"), ["block-size", "128", "got 129"]),
    "logs in a full folder": (("--log-dir", "full"), ["full", "--overwrite"]),
    "model in a full folder": (("--out", "full"), ["full", "--overwrite"]),
    "model in a full folder, set": (("--set", "out=full"), ["full", "--overwrite"]),
    "no such graph": (("--graph", "none"), ["none", "config.json"]),
    "a graph cut short": (("--graph", "cut"), ["whole safetensors", "cut"]),
    "not a graph": (("--graph", "dense"), ["expected an expert graph", "'llama'"]),
    "no dense base": (("--set", "base=graph"), ["dense model of type llama"]),
    "a graph without a recipe": (("--set", "base=dense"), ["recipe.safetensors", "fedgraft bootstrap"]),
    "no core": (("--client-cpus", "0"), ["client-cpus"]),
    "unknown option": (("--rho", "1"), ["--rho"]),
}  # fmt: skip


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_before_any_process_starts(place, simulations, capsys, case, as_json):
    arguments, words = BAD_INPUT[case]
    before = tree(place)
    outcome = run(capsys, *COMMAND, *arguments, *(["--json"] if as_json else []))
    assert_refused(outcome, *words, as_json=as_json)
    assert simulations == [] and tree(place) == before


def test_without_a_graph_the_quick_start_is_pointed_at(place, simulations, capsys, monkeypatch):
    monkeypatch.setenv("FEDGRAFT_CACHE", str(place / "cache"))
    outcome = run(capsys, "simulate", "--data", "texts/letters.jsonl")
    assert_refused(outcome, "expected a graph", "quickstart.sh", as_json=False)
    shutil.copytree("graph", place / "cache" / "graph")
    outcome = run(capsys, "simulate", *COMMAND[3:])
    assert outcome.code == 0 and simulations[0][1]["run_config"]["graph"] == ""


def test_a_good_command_runs_this_project_with_absolute_paths(place, simulations, capsys):
    (place / "run.toml").write_text(
        'server-data = "texts/letters.jsonl"\nnum-rounds = 5\nreply-timeout = 100.0'
    )
    outcome = run(capsys, *COMMAND, "--config", "run.toml", "--out", "model", "--client-cpus", "2", "--json")
    assert (outcome.code, outcome.json()) == (0, SUMMARY)
    ((project, options),) = simulations
    assert project == PROJECT and (project / "pyproject.toml").is_file()
    assert (options["num_supernodes"], options["client_cpus"]) == (2, 2)
    assert options["log_dir"] == place / "logs" / "run"
    assert options["timeout"] > (2 * 5 + 1) * 100.0  # a round may take two exchanges
    values = options["run_config"]
    assert values["graph"] == str(place / "graph") and values["out"] == str(place / "model")
    assert values["data"] == f"{place / 'texts/letters.jsonl'};{place / 'texts/digits.jsonl'}"
    assert values["server-data"] == str(place / "texts/letters.jsonl")
    assert values["log-dir"] == str(place / "logs" / "run")


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (("--log-dir", "mine"), "mine"),
        (("--config", "run.toml"), "from/file"),
        (("--config", "run.toml", "--log-dir", "mine"), "mine"),
        (("--log-dir", "mine", "--set", "log-dir=set"), "set"),
    ],
)
def test_the_log_folder_may_be_given_in_any_way(place, simulations, capsys, arguments, folder):
    (place / "run.toml").write_text('log-dir = "from/file"')
    assert run(capsys, *COMMAND, *arguments).code == 0
    ((_, options),) = simulations
    assert options["log_dir"] == place / folder
    assert options["run_config"]["log-dir"] == str(place / folder)


def test_with_overwrite_an_earlier_run_is_cleared_away_before_it_is_followed(place, simulations, capsys):
    logs = place / "logs" / "run"
    for name in (
        "rounds.jsonl",
        "merge_round1.json",
        "clients/run-1/client-0/global.safetensors",
        "notes.txt",
    ):
        (logs / name).parent.mkdir(parents=True, exist_ok=True)
        (logs / name).write_text("{}")
    assert_refused(run(capsys, *COMMAND), "--overwrite", as_json=False)
    outcome = run(capsys, *COMMAND, "--overwrite")
    assert outcome.code == 0 and simulations[0][1]["run_config"]["overwrite"] is True
    assert sorted(path.name for path in logs.iterdir()) == ["notes.txt", "summary.json"]


def test_a_failed_run_is_a_failure_of_one_line(place, capsys, monkeypatch):
    def fail(*_, **__):
        raise UserError("expected better data, got worse")

    monkeypatch.setattr("server.flower.simulation.run_simulation", fail)
    assert_refused(run(capsys, *COMMAND, "--json"), "expected better data, got worse", as_json=True)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_client_that_was_never_used_is_in_the_table_and_the_run_exits_with_1(
    place, capsys, monkeypatch, as_json
):
    unused = dict.fromkeys(SUMMARY["clients"][0]) | {"name": "node-7", "refused": "disk full"}
    summary = SUMMARY | {"clients": [*SUMMARY["clients"], unused]}

    def simulate(project: Path, *, log_dir: Path, **options) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        (log_dir / "summary.json").write_text(json.dumps(summary))
        failure = {"type": "UnusedClients", "message": "got none of node-7: disk full"}
        (log_dir / "failure.json").write_text(json.dumps(failure))
        raise RunFailed("finished:failed")

    monkeypatch.setattr("server.flower.simulation.run_simulation", simulate)
    outcome = run(capsys, *COMMAND, *(["--json"] if as_json else []))
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == "fedgraft: error: got none of node-7: disk full"
    if as_json:
        assert outcome.json() == summary
    else:
        assert "no update of node-7 was used: disk full" in outcome.out


def test_any_other_failure_of_a_run_is_a_failure_of_one_line(place, capsys, monkeypatch):
    def fail(*_, **__):
        raise RunFailed("the run ended as finished:failed: RuntimeError: no memory")

    monkeypatch.setattr("server.flower.simulation.run_simulation", fail)
    outcome = run(capsys, *COMMAND)
    assert (outcome.code, outcome.out) == (1, "") and "no memory" in outcome.err


def test_a_run_is_continued_with_its_own_settings(place, simulations, capsys):
    (place / "run.toml").write_text("num-rounds = 5\ndensity = 0.25")
    run(capsys, *COMMAND, "--config", "run.toml", "--out", "model", "--overwrite")
    (_, options), log_dir = simulations[0], place / "logs" / "run"
    Settings(3, "f", options["run_config"]).write(log_dir / STATE_FOLDER)
    kept = ["rounds.jsonl", "clients/run-3/client-0/blocks.safetensors"]
    for name in kept:
        (log_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (log_dir / name).touch()
    outcome = run(capsys, "simulate", "--resume", "logs/run", "--client-cpus", "2", "--json")
    assert (outcome.code, outcome.json()) == (0, SUMMARY)
    continued = simulations[1][1]
    assert continued["run_config"] == options["run_config"] | {"resume": True}
    assert (continued["log_dir"], continued["client_cpus"]) == (log_dir, 2)
    assert all((log_dir / name).exists() for name in kept)


@pytest.mark.parametrize("other", [("--clients", "2"), ("--set", "seed=1"), ("--overwrite", "--rounds", "9")])
def test_a_run_is_continued_without_other_options(place, simulations, capsys, other):
    outcome = run(capsys, "simulate", "--resume", "logs/run", *other)
    assert_refused(outcome, "--resume without other options", as_json=False)


def test_a_folder_without_a_state_cannot_be_continued(place, simulations, capsys):
    outcome = run(capsys, "simulate", "--resume", "full")
    assert_refused(outcome, "expected the state of a run", "settings.json", as_json=False)
    assert simulations == []


def test_the_result_for_a_reader_is_a_table_and_what_was_written(place, simulations, capsys):
    outcome = run(capsys, *COMMAND)
    assert outcome.code == 0 and "letters" in outcome.out and "model: /out" in outcome.out


def test_a_real_federation_on_flowers_simulation_engine(graph, tmp_path, capsys, monkeypatch):
    """The one successful run in the suite of all that belongs to it: SuperLink, Ray, both apps (half a minute)."""
    left, values = [], run_values(
        graph, tmp_path, num_rounds=2, local_steps=2, rho_max=3, reply_timeout=120.0
    )

    def stop(job: str) -> None:
        stop_job(job)
        left.extend(job_processes(job))

    monkeypatch.setattr("server.flower.simulation.stop_job", stop)
    for name, proxy in UNREACHABLE_PROXY.items():
        monkeypatch.setenv(name, proxy)
    scratch = scratch_folders(monkeypatch)
    # Where the command is given must not matter to the app.
    (tmp_path / "here" / "clients").mkdir(parents=True)
    (tmp_path / "here" / "clients" / "__init__.py").write_text(
        "raise RuntimeError('of the working directory')"
    )
    monkeypatch.chdir(tmp_path / "here")
    values |= {"server-data": str(tmp_path / "texts" / "letters.jsonl"), "merge-max-drift": 100.0}
    out = tmp_path / "it's out"
    outcome = run(capsys, "simulate", *options_of(values), "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    logs = tmp_path / "logs"
    assert_run_succeeded(outcome.json(), logs=logs, out=out, names=["letters", "digits"])
    assert "round 2/2" in outcome.err  # rounds are shown while they come
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "it's out", "logs", "texts"]
    assert sorted(path.parent.name for path in logs.rglob("global.safetensors")) == ["client-0", "client-1"]
    assert left == [] and len(scratch) == 1 and not scratch[0].exists()
    # The same weights as over the in-process grid, and as in a deployment (tests/scripts/deploy).
    config = load_run_config(values | {name: str(tmp_path / "grid" / name) for name in ("log-dir", "out")})
    assert weights_hash(out) == weights_hash(
        Path(run_federation(TinyGrid(config), config, run_id=RUN_ID)["out"])
    )


def options_of(values: dict) -> list[str]:
    """The options of ``simulate`` that say the same as a run configuration."""
    named = {"graph": "--graph", "log-dir": "--log-dir", "num-rounds": "--rounds", "num-clients": "--clients"}
    options = [part for key, option in named.items() for part in (option, str(values[key]))]
    options += [part for source in values["data"].split(";") for part in ("--data", source)]
    others = [f"{key}={json.dumps(value)}" for key, value in values.items() if key not in {*named, "data"}]
    return options + [part for assignment in others for part in ("--set", assignment)]


def scratch_folders(monkeypatch) -> list[Path]:
    """The scratch folders that a simulation makes from now on."""
    folders: list[Path] = []
    make = tempfile.mkdtemp

    def remember(*arguments, **options) -> str:
        folder = make(*arguments, **options)
        if options.get("prefix") == "fedgraft-":
            folders.append(Path(folder))
        return folder

    monkeypatch.setattr("server.flower.simulation.tempfile.mkdtemp", remember)
    return folders


def test_a_continued_run_replaces_the_model_that_it_saved_when_it_was_interrupted(place, simulations, capsys):
    run(capsys, *COMMAND, "--out", "model")
    (_, options), log_dir = simulations[0], place / "logs" / "run"
    Settings(3, "f", options["run_config"]).write(log_dir / STATE_FOLDER)
    write_texts(place / "model")
    outcome = run(capsys, "simulate", "--resume", "logs/run")
    assert_refused(outcome, "model with files in it", as_json=False)
    assert run(capsys, "simulate", "--resume", "logs/run", "--overwrite").code == 0
    assert simulations.pop()[1]["run_config"]["overwrite"] is True
    (log_dir / "summary.json").write_text(json.dumps(SUMMARY | {"out": str(place / "model")}))
    assert run(capsys, "simulate", "--resume", "logs/run").code == 0
    assert simulations[1][1]["run_config"]["overwrite"] is True


@pytest.mark.parametrize("name", [DRIVER_LOCK, SERVER_LOCK])
def test_a_log_folder_of_a_living_run_is_refused_also_with_overwrite(place, simulations, capsys, name):
    logs = place / "logs" / "run"
    with holding(logs, name):
        before = tree(place)
        outcome = run(capsys, *COMMAND, "--overwrite", "--json")
        assert_refused(outcome, f"in use by process {os.getpid()} on", "--log-dir", as_json=True)
        assert simulations == [] and tree(place) == before
    assert run(capsys, *COMMAND, "--overwrite").code == 0


def test_the_log_folder_is_locked_while_the_run_lasts(place, capsys, monkeypatch):
    def simulate(project: Path, *, log_dir: Path, **options) -> None:
        with pytest.raises(UserError, match="in use by"):
            check_unused(log_dir)
        (log_dir / "summary.json").write_text(json.dumps(SUMMARY))

    monkeypatch.setattr("server.flower.simulation.run_simulation", simulate)
    assert run(capsys, *COMMAND).code == 0
    assert [path.name for path in (place / "logs" / "run").iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    ("summary", "line"),
    [
        (SUMMARY, "interrupted; the model after round 2 is in /out"),
        (SUMMARY | {"out": ""}, "interrupted after the last round (logs: "),
        (None, "interrupted before the first round ended; no model was written (logs: "),
    ],
)
def test_an_interrupted_run_says_in_one_line_what_was_saved_and_leaves_no_replies(
    place, capsys, monkeypatch, summary, line
):
    logs = place / "logs" / "run"
    logs.mkdir(parents=True)
    (logs / "summary.json").write_text(json.dumps(SUMMARY | {"out": "/of/an/earlier/run"}))

    def simulate(project: Path, **options) -> None:
        (logs / ".replies.abc").mkdir()
        request_stop(logs)
        if summary:
            (logs / "summary.json").write_text(json.dumps(summary))
        raise KeyboardInterrupt

    monkeypatch.setattr("server.flower.simulation.run_simulation", simulate)
    outcome = run(capsys, *COMMAND, "--overwrite")
    (error,) = outcome.err.splitlines()
    assert (outcome.code, outcome.out) == (130, "") and error.startswith(f"fedgraft: error: {line}")
    assert [path.name for path in logs.iterdir()] == (["summary.json"] if summary else [])


def test_a_run_without_a_summary_names_its_model(place, capsys, monkeypatch):
    monkeypatch.setattr("server.flower.simulation.run_simulation", lambda *_, **__: None)
    outcome = run(capsys, *COMMAND, "--out", "model")
    assert outcome.code == 1 and f"the model is in {place / 'model'}" in outcome.err
