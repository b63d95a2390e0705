"""Folder on a SuperLink's machine with log directory and model of a run: requests to it, and its copy over SSH."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.output import new_directory
from server.flower.flower_process import RunFailed
from server.state.run_lock import DRIVER_LOCK, SERVER_LOCK
from server.state.settings import STATE_FOLDER
from server.state.stop_request import STOP_FILE

LOGS, MODEL = "logs", "model"
# Parts of a log directory that stay on the server: state to continue from, with secret keys, locks and requests.
KEPT = (STATE_FOLDER, "clients", DRIVER_LOCK, SERVER_LOCK, STOP_FILE)
_PLACE = re.compile(r"(?:(?P<host>[\w.@-]*[\w.]):)?(?P<folder>/.*)")
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


@dataclass(frozen=True)
class ServerFolder:
    """Folder of a run on the SuperLink's machine.

    Args:
        host: name of the machine for ``ssh``; empty: the folder is mounted here, too.
        folder: absolute path there.
    """

    host: str
    folder: Path

    @classmethod
    def parse(cls, place: str) -> ServerFolder:
        """Read ``[[USER@]HOST:]/FOLDER``.

        Raises:
            UserError: no absolute path, or a host that could be an option of ``ssh``.
        """
        match = _PLACE.fullmatch(place)
        if match is None or (match["host"] or "").startswith("-"):
            raise UserError(
                f"expected `server_folder` as [[USER@]HOST:]/FOLDER with an absolute path, got {place!r}"
            )
        return cls(match["host"] or "", Path(match["folder"]))

    def request_stop(self) -> None:
        """Request that the run saves its model and ends. Raises RunFailed if the folder cannot be reached."""
        self._run("touch", str(self.folder / LOGS / STOP_FILE))

    def fetch_model(self, target: Path, *, overwrite: bool) -> None:
        """Copy the trained model to the directory ``target``, which appears when it is complete.

        Raises:
            RunFailed: the model cannot be read.
            UserError: ``target`` is not empty and ``overwrite`` is false.
        """
        with new_directory(target, overwrite=overwrite) as partial:
            self._copy(self.folder / MODEL, partial)

    def fetch_logs(self, target: Path) -> None:
        """Copy the log files to the directory ``target``, in place of files of the same name; KEPT are left out.

        Raises:
            RunFailed: they cannot be read.
        """
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fedgraft.", suffix=".partial", dir=target) as partial:
            self._copy(self.folder / LOGS, Path(partial))
            for path in Path(partial).iterdir():
                if path.is_dir():
                    shutil.rmtree(target / path.name, ignore_errors=True)
                path.replace(target / path.name)

    def _copy(self, source: Path, target: Path) -> None:
        if self.host:
            self._unpack(source, target)
        elif source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*KEPT), dirs_exist_ok=True)
        else:
            raise RunFailed(f"expected the results of the run in {source}, found no such folder")

    def _unpack(self, source: Path, target: Path) -> None:
        excluded = [f"--exclude=./{name}" for name in KEPT]
        command = [*_SSH, self.host, shlex.join(["tar", "-C", str(source), *excluded, "-cf", "-", "."])]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with process:
            try:
                with tarfile.open(mode="r|", fileobj=process.stdout) as archive:
                    archive.extractall(target, filter="data")  # no paths outside, links, devices or owners
            except tarfile.TarError as error:
                process.kill()
                raise self._failure(process.stderr.read() if process.stderr else b"", error) from error
            errors = process.stderr.read() if process.stderr else b""
        if process.returncode:
            raise self._failure(errors)

    def _run(self, *command: str) -> None:
        remote = [*_SSH, self.host, shlex.join(command)] if self.host else list(command)
        result = subprocess.run(remote, stdin=subprocess.DEVNULL, capture_output=True)
        if result.returncode:
            raise self._failure(result.stderr)

    def _failure(self, errors: bytes, error: Exception | None = None) -> RunFailed:
        lines = errors.decode(errors="replace").strip().splitlines() or [str(error or "no message")]
        where = f"{self.host}:{self.folder}" if self.host else str(self.folder)
        return RunFailed(f"the folder {where} of the SuperLink's machine cannot be used: {lines[-1]}")
