"""Folders that the page reads and writes: the base model, and the folder of runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEPTH = 3  # levels below the folder of runs on which checkpoints and log directories are found
_MOST_FOUND = 500


@dataclass(frozen=True)
class Workspace:
    """Base model and folder of runs.

    Attributes:
        model: folder of the base model; None for none.
        runs: folder under which every output of the page is written; it need not exist.
    """

    model: Path | None
    runs: Path

    def models(self) -> list[str]:
        """Checkpoint folders: the base model, then those below ``runs``."""
        base = [] if self.model is None else [str(self.model)]
        return base + [str(path.parent) for path in self._found("config.json")]

    def run_folders(self) -> list[str]:
        """Log directories below ``runs`` in which a round was written, the latest first."""
        found = self._found("rounds.jsonl")
        return [str(path.parent) for path in sorted(found, key=_written_at, reverse=True)]

    def known_model(self, path: str | None) -> Path:
        """A folder of ``models()``.

        Raises:
            UserError: no model chosen, or another folder.
        """
        if path and path in self.models():
            return Path(path)
        raise UserError(
            f"expected a `model` of the list, got {path or 'none'}; start with `fedgraft ui --model DIR`"
        )

    def known_run(self, path: str | None) -> Path:
        """A folder of ``run_folders()``.

        Raises:
            UserError: no run chosen, or another folder.
        """
        if path and path in self.run_folders():
            return Path(path)
        raise UserError(
            f"expected a `run` of the list, got {path or 'none'}; refresh the list or start a run"
        )

    def new_folder(self, name: str | None) -> Path:
        """Path ``runs/name`` of a new output.

        Raises:
            UserError: a name that is empty or no plain name, or a folder that is there.
        """
        if not _NAME.fullmatch(name or ""):
            raise UserError(
                f"expected `name` of letters, digits, dots, dashes and underscores, got {name!r}; outputs are written "
                f"to {self.runs}/NAME only"
            )
        path = self.runs / str(name)
        if path.exists():
            raise UserError(
                f"expected a `name` that is not taken, got {path}, which is there; choose another"
            )
        return path

    def _found(self, name: str) -> list[Path]:
        patterns = ["/".join(["*"] * depth + [name]) for depth in range(1, _DEPTH + 1)]
        found = [path for pattern in patterns for path in sorted(self.runs.glob(pattern))]
        return [path for path in found if path.parent.name[0] != "."][:_MOST_FOUND]


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
