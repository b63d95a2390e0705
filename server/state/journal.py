"""State of a run on disk after each round, from which a killed run continues bit for bit.

The model itself is not written: it follows from the bootstrapped checkpoint by the server's steps, which are small, as
it does on the clients.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.errors import UserError
from federated.protocol.steps import ServerStep, read_step
from federated.updates.update import RefusedUpdate, parse_unit, unit_name
from models.files.checked_file import (
    bytes_tensor,
    check_in_turn,
    read_checked,
    tensor_bytes,
    write_checked,
    write_in_turn,
)
from models.files.numbered_files import NumberedFiles
from models.files.safetensors_files import read_stored
from models.graph.unit_vectors import Unit
from server.model.global_model import GlobalModel
from server.state.federation_state import FederationState
from server.state.run_history import RunHistory
from server.state.settings import STATE_FOLDER

KEPT_ROUNDS = 2  # states kept: where the last one is damaged, the run continues from the one before

_FACTS, _FEDERATION = "facts", "federation"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedRound:
    """State after a completed round, or before the first.

    Attributes:
        state: federation state.
        history: record of the run for its summary and logs.
    """

    state: FederationState = field(default_factory=FederationState)
    history: RunHistory = field(default_factory=RunHistory)


class Journal:
    """Files ``state/step-N.safetensors``, one per server step, and ``state/round-N.safetensors`` with everything else.

    A round's file is written after the step that it needs, and replaced atomically, so that a kill at any moment leaves
    a state to continue from.

    Args:
        log_dir: log directory of the run.
    """

    def __init__(self, log_dir: Path) -> None:
        self.folder = Path(log_dir) / STATE_FOLDER
        self._rounds = NumberedFiles(self.folder, "round")
        self._steps = NumberedFiles(self.folder, "step")

    def clear(self) -> None:
        """Remove the state of an earlier run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self, global_model: GlobalModel, state: FederationState, history: RunHistory) -> None:
        """Write the state after a round.

        Args:
            global_model: model after the round and its graph edits.
            state: federation state after the round.
            history: see ``SavedRound``.
        """
        latest = global_model.steps[-1]
        packed = {"packed": bytes_tensor(latest.packed)}
        write_checked(self._steps.path(latest.version), packed, {"edits": latest.edits_json()})
        facts = {
            "version": global_model.version,
            "kept_from": global_model.steps[0].version - 1,
            "copy_hash": global_model.copy_hash,
            "history": history.to_json(),
        }
        texts = {_FACTS: json.dumps(facts).encode(), _FEDERATION: state.to_bytes()}
        residual = {unit_name(unit): vector for unit, vector in global_model.residual.items()}

        def read(name: str) -> Tensor:
            return bytes_tensor(texts[name]) if name in texts else residual[name]

        write_in_turn(self._rounds.path(state.server_round), [*texts, *residual], read, {})
        for earlier in self._rounds.numbers()[:-KEPT_ROUNDS]:
            self._rounds.path(earlier).unlink()

    def restore(self, global_model: GlobalModel) -> SavedRound | None:
        """Bring a freshly opened model to the last saved round; None where no round was completed.

        A damaged state is skipped with a warning.

        Raises:
            UserError: no saved round is intact.
        """
        rounds = self._rounds.numbers()
        for server_round in reversed(rounds):
            found = self._read(server_round)
            if found is not None:
                facts, state, residual, steps = found
                self._replay(global_model, steps, residual, facts)
                return SavedRound(state, RunHistory.from_json(facts["history"]))
            _log.warning(
                "the state of round %d in %s is damaged: the one before is used", server_round, self.folder
            )
        if rounds:
            raise UserError(
                f"expected an intact state in {self.folder}, got only damaged ones; start the run again"
            )
        return None

    def _replay(
        self,
        global_model: GlobalModel,
        steps: list[ServerStep],
        residual: dict[Unit, Tensor],
        facts: Mapping[str, Any],
    ) -> None:
        """Bring the model to the saved version; UserError where it is not the saved one then."""
        try:
            global_model.replay(steps, residual, kept_from=facts["kept_from"])
            same = global_model.copy_hash == facts["copy_hash"]
        except RefusedUpdate:
            same = False
        if not same:
            raise UserError(
                f"expected the saved model of version {facts['version']} from the steps in {self.folder}, got another; "
                "continue the run with the graph and the version of torch that it was started with"
            )

    def _read(
        self, server_round: int
    ) -> tuple[dict[str, Any], FederationState, dict[Unit, Tensor], list[ServerStep]] | None:
        """Contents of a saved round and its steps; None where a file is missing or damaged."""
        saved = check_in_turn(self._rounds.path(server_round))
        if saved is None:
            return None
        tensors = saved[0]
        facts = json.loads(tensor_bytes(read_stored(tensors[_FACTS])))
        state = FederationState.from_bytes(tensor_bytes(read_stored(tensors[_FEDERATION])))
        steps = self.steps(facts["version"])
        if steps is None:
            return None
        units = {name: tensor for name, tensor in tensors.items() if name not in (_FACTS, _FEDERATION)}
        residual = {parse_unit(name): read_stored(tensor) for name, tensor in units.items()}
        return facts, state, residual, steps

    def steps(self, version: int) -> list[ServerStep] | None:
        """Read the steps from the bootstrapped model to ``version``; None where one is missing or damaged."""
        found = [self._read_step(number) for number in range(1, version + 1)]
        steps = [step for step in found if step is not None]
        return steps if len(steps) == len(found) else None

    def _read_step(self, version: int) -> ServerStep | None:
        saved = read_checked(self._steps.path(version))
        if saved is None:
            return None
        try:
            return read_step(version, tensor_bytes(saved[0]["packed"]), saved[1]["edits"])
        except RefusedUpdate:
            return None
