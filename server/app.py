"""The Flower ServerApp: load the graph, run the federation, write logs and a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from configs.directory_placement import remove_partials
from configs.output import check_output_directory
from configs.paths import cache_folder, graph_or_default
from configs.schema import RunConfig, load_run_config
from federated.data.answers import documents_of
from federated.data.blocks import Blocks, pack_blocks
from federated.data.chat_template import ChatTemplate
from federated.data.documents import load_documents
from federated.run_setup import override_routing, prepare_process, with_block_size
from models.bootstrap.calibration import sample_text
from server.model.config_checks import check_fit, check_room
from server.model.global_model import GlobalModel
from server.privacy.budget import PrivacyBudget
from server.privacy.noise import NoiseSource
from server.privacy.noise_key import create_noise_key, read_noise_key, remove_noise_key
from server.reporting.call_trace import call_trace
from server.reporting.failure import recording_failure
from server.reporting.record_stream import printing_records
from server.reporting.unused_clients import check_all_used
from server.rounds.best_model import close_run
from server.rounds.interruption import replacing_own_model, save_interrupted
from server.rounds.loop import Federation
from server.rounds.reply_spool import remove_spools
from server.rounds.run_observer import RunObserver
from server.rounds.stoppable_grid import StoppableGrid
from server.state.federation_state import FederationState
from server.state.journal import Journal, SavedRound
from server.state.run_lock import SERVER_LOCK, holding
from server.state.settings import Settings, read_settings
from server.state.stop_request import clear_stop
from server.strategies.private import PrivateAggregation
from server.strategies.sam_v2 import sam_v2
from server.strategies.strategy import Strategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation from Flower's run configuration; an exception is also left as ``failure.json`` in ``log-dir``.

    Raises:
        UserError: bad input of any kind; another run uses ``log-dir``, in which nothing is written then.
        UnusedClients: no update of a client was used; the model is saved.
    """
    log_dir = context.run_config.get("log-dir")
    folder = Path(str(log_dir)) if log_dir else None
    with _locked(folder), printing_records(folder), recording_failure(folder):
        config = load_run_config(context.run_config)
        check_all_used(run_federation(grid, config, run_id=context.run_id), config.num_clients)


def run_federation(grid: Grid, config: RunConfig, *, run_id: int) -> dict:
    """Run a federation over ``grid`` and return its summary (see ``server.rounds.run_observer``).

    On an exception after the first trained round the model is saved before the exception is raised again.

    Args:
        grid: Flower's.
        config: run configuration.
        run_id: names the log directory where ``log-dir`` is not configured.

    Raises:
        UserError: bad input; before the first trained round nothing has been written but logs.
        RuntimeError: no client gave a usable update in repeated exchanges of a round.
        StopRequested: the run was interrupted.
    """
    prepare_process(config)
    log_dir = Path(config.log_dir) if config.log_dir else cache_folder() / "runs" / str(run_id)
    config = replacing_own_model(config, log_dir)
    if config.out:
        check_output_directory(Path(config.out), overwrite=config.overwrite)
    PrivacyBudget(config.privacy).check()
    global_model = open_global_model(config)
    config = with_block_size(config, global_model.model.config)
    validation = server_text(config, global_model)
    journal = Journal(log_dir)
    settings, saved = open_state(journal, config, global_model, run_id=run_id)
    observer = RunObserver(log_dir, global_model=global_model, history=saved.history)
    federation = Federation(
        grid=StoppableGrid(grid, log_dir),
        config=config,
        global_model=global_model,
        strategy=_strategy(config, journal, saved.state, validation),
        observer=observer,
        journal=journal,
        state=saved.state,
        run_id=settings.run_id if settings.run_id != run_id else 0,
    )
    try:
        federation.run()
        text = validation.input_ids if validation is not None else _sampled(global_model, config)
        observer.trace(call_trace(global_model.model, text, config.trace_tokens))
        _save(global_model, config)
    except BaseException as error:
        save_interrupted(federation, error)
        raise
    if config.privacy.on:
        remove_noise_key(journal.folder)
    return close_run(federation, out=config.out)


def open_state(
    journal: Journal, config: RunConfig, global_model: GlobalModel, *, run_id: int
) -> tuple[Settings, SavedRound]:
    """Settings of the run, and the saved round that it starts from; ``global_model`` is brought to it.

    Args:
        journal: state in the log directory; that of an earlier run is removed unless it is continued.
        config: run configuration; ``resume`` continues.
        global_model: model as bootstrapped.
        run_id: Flower's id of this run.

    Raises:
        UserError: no state to continue from, other settings, or only damaged states.
    """
    if config.resume:
        settings = read_settings(journal.folder)
        settings.check(config, global_model.fingerprint)
        return settings, journal.restore(global_model) or SavedRound()
    journal.clear()
    if config.privacy.on:
        create_noise_key(journal.folder)  # before the settings, without which there is nothing to continue
    settings = Settings(run_id, global_model.fingerprint, config.values())
    settings.write(journal.folder)
    return settings, SavedRound()


def _strategy(
    config: RunConfig, journal: Journal, state: FederationState, validation: Blocks | None
) -> Strategy:
    """The federated method of a run, with differential privacy where it is configured."""
    method = sam_v2(config, validation=validation)
    if not config.privacy.on or state.server_round >= config.num_rounds or state.stopped:
        return method  # without a further round there is no key of the noise any more
    return PrivateAggregation(method, config, NoiseSource(read_noise_key(journal.folder)))


@contextmanager
def _locked(log_dir: Path | None) -> Iterator[None]:
    """Lock the configured log directory and remove requests to stop and replies of a killed process.

    Without a configured one its name is the run id's alone.
    """
    if log_dir is None:
        yield
        return
    with holding(log_dir, SERVER_LOCK):
        clear_stop(log_dir)
        remove_spools(log_dir)
        try:
            yield
        finally:
            clear_stop(log_dir)


def open_global_model(config: RunConfig) -> GlobalModel:
    """Load the configured graph, with the run's walk and experts per token.

    Raises:
        UserError: there is no graph, the configuration does not fit it, or there is no room for the result.
    """
    source = graph_or_default(config.graph)
    check_fit(config, source)
    check_room(config, source)
    global_model = GlobalModel(source)
    override_routing(global_model.model, config)
    return global_model


def server_text(config: RunConfig, global_model: GlobalModel) -> Blocks | None:
    """Return the server's own validation text as blocks; None where none is configured."""
    if not config.server_sources:
        return None
    documents = load_documents(
        config.server_sources,
        template=config.template,
        chat=ChatTemplate(lambda: global_model.tokenizer),
        loss_on=config.loss_on,
        wikimix_documents=config.train_documents,
        seed=config.seed + 1,
    ).shuffle(seed=config.seed)
    texts = documents_of(row for row in documents if row["split"] == "valid")
    return pack_blocks(
        texts,
        global_model.tokenizer,
        block_size=config.block_size,
        max_blocks=config.eval_blocks,
        vocab_size=global_model.model.config.vocab_size,
    )


def _save(global_model: GlobalModel, config: RunConfig) -> None:
    """Write the model to ``out``, if it is configured."""
    if config.out:
        global_model.save(Path(config.out), overwrite=config.overwrite)
        if config.resume:  # the run may have been killed while it wrote its model
            remove_partials(Path(config.out))


def _sampled(global_model: GlobalModel, config: RunConfig) -> torch.Tensor:
    """Sample token ids ``[1, S]`` from the model, for the call trace of a server without text."""
    length = max(2, min(config.block_size, config.trace_tokens))
    return sample_text(global_model.model, blocks=1, block_size=length, seed=config.seed)
