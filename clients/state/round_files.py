"""Files of a client with one version per training round, so that a round can be repeated from the state before it."""

from __future__ import annotations

from pathlib import Path

from models.files.numbered_files import NumberedFiles


class RoundFiles:
    """Files ``NAME-ROUND.safetensors``: the state after a round in which the client trained.

    The states before and after the latest round are kept. A server that was killed asks for that round again after it
    has been resumed, and gets the same update only from the state before it.

    Args:
        folder: folder of the files.
        name: NAME.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._files = NumberedFiles(folder, name)

    def after(self, server_round: int) -> Path:
        """Path of the state after ``server_round``."""
        return self._files.path(server_round)

    def before(self, server_round: int) -> Path:
        """Path of the newest state before ``server_round``; that of round 0, which does not exist, without one."""
        return self.after(max((each for each in self._files.numbers() if each < server_round), default=0))

    def prune(self, server_round: int) -> None:
        """Remove all states but those before and after ``server_round``."""
        kept = (self.before(server_round), self.after(server_round))
        for each in self._files.numbers():
            if self.after(each) not in kept:
                self.after(each).unlink(missing_ok=True)
