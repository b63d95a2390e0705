"""Run configuration from a file and options, or from the state of an earlier run, and its check before a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.shared.console import stderr

if TYPE_CHECKING:
    from configs.schema import RunConfig

DEFAULT_LOG_DIR = "logs/run"
PROJECT = Path(__file__).resolve().parents[2]  # folder of the Flower app


def read_run_config(config: Path | None, given: dict[str, Any], assignments: list[str]) -> RunConfig:
    """Read the run configuration: defaults, the file, named options, ``--set``, later ones first; paths made absolute.

    Raises:
        UserError: unknown keys, values out of range, conflicts.
    """
    from configs.schema import load_run_config
    from configs.values import parse_assignments, read_config_file
    from federated.data.documents import absolute_sources

    values = {"log-dir": DEFAULT_LOG_DIR} | (read_config_file(config) if config else {})
    values |= {key: value for key, value in given.items() if value not in (None, "")}
    values |= parse_assignments(assignments)
    run = load_run_config(values)
    absolute = {
        "data": ";".join(absolute_sources(run.sources)),
        "server-data": ";".join(absolute_sources(run.server_sources)),
        "graph": absolute_path(run.graph),
        "base": absolute_path(run.base),
        "template": absolute_path(run.template) if run.template.endswith(".json") else run.template,
        "log-dir": absolute_path(Path(run.log_dir)),
        "out": absolute_path(Path(run.out)) if run.out else "",
    }
    return load_run_config(run.values() | absolute)


def read_resumed_config(log_dir: Path, *, alone: bool, overwrite: bool = False) -> RunConfig:
    """Read the run configuration of a run that is continued, from the state in its log directory.

    Args:
        log_dir: log directory of the run.
        alone: whether no other option of a run configuration was given beside it.
        overwrite: whether the output directory may be replaced; the model that the run itself saved always is.

    Raises:
        UserError: other options were given, or the directory holds no state of a run.
    """
    from configs.errors import UserError
    from configs.schema import load_run_config
    from server.rounds.interruption import replacing_own_model
    from server.state.journal import STATE_FOLDER
    from server.state.settings import read_settings

    if not alone:
        raise UserError("expected --resume without other options of the run, got some; its settings are kept")
    log_dir = log_dir.absolute()
    values = dict(read_settings(log_dir / STATE_FOLDER).values)
    values["overwrite"] |= overwrite
    run = load_run_config(values | {"log-dir": str(log_dir), "resume": True})
    return replacing_own_model(run, log_dir)


def read_node_values(assignments: list[str]) -> dict[str, Any]:
    """Read the node configuration ``KEY=VALUE...`` of a command line: names with hyphens, existing paths made absolute.

    Raises:
        UserError: an assignment without a key or ``=``.
    """
    from configs.values import parse_assignments

    values = parse_assignments(assignments)
    paths = {key for key in ("graph", "base", "data-dir", "cache-dir") if key in values}
    return values | {key: absolute_path(str(values[key])) for key in paths}


def check_run(run: RunConfig) -> None:
    """Check log and output directories, room on disk, graph, and data of server and clients before any process starts.

    Raises:
        UserError: the first problem, in one line.
    """
    from clients.data_stream import all_clients, check_tokens
    from configs.output import check_output_directory
    from configs.paths import graph_or_default
    from federated.data.chat_template import ChatTemplate
    from federated.data.documents import load_documents
    from models.bootstrap.recipe_build import check_base
    from models.checkpoints.load import check_weights, load_tokenizer
    from server.model.config_checks import check_fit, check_room
    from server.privacy.budget import PrivacyBudget
    from server.state.run_lock import check_unused

    check_unused(Path(run.log_dir))
    PrivacyBudget(run.privacy).check()
    folders = (run.out,) if run.resume else (run.log_dir, run.out)
    for folder in filter(None, folders):
        check_output_directory(Path(folder), overwrite=run.overwrite)
    graph = graph_or_default(run.graph)
    check_fit(run, graph)
    check_weights(graph)
    check_room(run, graph)
    if run.base:
        check_base(run.base, graph)
        check_weights(run.base)
    with stderr.status("reading the data"):
        chat = ChatTemplate(partial(load_tokenizer, graph))
        check_tokens(all_clients(run, chat=chat), graph, run.block_size)
        if run.server_sources:
            load_documents(
                run.server_sources, template=run.template, chat=chat, loss_on=run.loss_on, wikimix_documents=1
            )


def absolute_path(path: str | Path | None) -> str:
    """Make a path absolute; text that is no existing path, e.g. a hub id, stays as it is."""
    found = Path(path).expanduser() if path else None
    return str(found.absolute()) if found and (isinstance(path, Path) or found.exists()) else str(path or "")
