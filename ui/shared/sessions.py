"""State and temporary folder of each browser session, removed when the session ends."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError

if TYPE_CHECKING:
    from ui.shared.jobs import Job

UPLOAD_SECONDS = 60.0  # from an upload to its callback, at most


class Session:
    """State of one browser session.

    Attributes:
        folder: temporary folder of the session's files.
        values: state of the tabs by name.
        uploads: copies of uploaded files that Gradio keeps in its cache.
        job: the command that runs; None for none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, Any] = {}
        self.uploads: set[Path] = set()
        self.job: Job | None = None

    def new_folder(self, name: str) -> Path:
        """A new empty folder; the one that the session had under this name before is removed.

        A new path each time: browsers may keep a downloaded file by its address.
        """
        if (old := self.values.get(f"folder:{name}")) is not None:
            shutil.rmtree(old, ignore_errors=True)
        path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))
        self.values[f"folder:{name}"] = path
        return path

    def start(self, job: Job) -> Job:
        """Start a job as that of the session.

        Raises:
            UserError: the session's last job still runs.
        """
        if self.job is not None and self.job.running:
            raise UserError(
                "expected one job at a time, got another while one runs; wait for it or cancel it"
            )
        self.job = job
        job.start()
        return job


class Sessions:
    """All open sessions of a server, by the session hash of Gradio.

    Args:
        root: temporary folder of the server, in which each session has a folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: dict[str, Session] = {}
        self._lock = threading.Lock()

    def get(self, session_hash: str | None) -> Session:
        """The session of a hash; opened at its first use."""
        with self._lock:
            if (key := session_hash or "") not in self._open:
                self._open[key] = Session(Path(tempfile.mkdtemp(prefix="session-", dir=self.root)))
            return self._open[key]

    def close(self, session_hash: str | None) -> None:
        """End a session: cancel its job, remove its folder, and its uploads.

        An upload that another session has, too, or may be about to read, stays until the cache expires: Gradio stores
        equal files once.
        """
        with self._lock:
            session = self._open.pop(session_hash or "", None)
            shared = {path for other in self._open.values() for path in other.uploads}
        if session is None:
            return
        if session.job is not None:
            session.job.cancel()
        shutil.rmtree(session.folder, ignore_errors=True)
        for path in session.uploads - shared:
            _remove_upload(path)

    def close_all(self) -> None:
        """End all sessions."""
        for key in list(self._open):
            self.close(key)


def _remove_upload(path: Path) -> None:
    """Remove an upload with its folder, unless it was written less than ``UPLOAD_SECONDS`` ago."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    if time.time() - max(status.st_mtime, status.st_ctime) >= UPLOAD_SECONDS:
        shutil.rmtree(path.parent, ignore_errors=True)
