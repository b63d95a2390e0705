"""Running the ``fedgraft`` command inside the test process, and looking at what it left on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import fedgraft


class Outcome(NamedTuple):
    """Exit code and output of one command."""

    code: int
    out: str
    err: str

    def json(self) -> dict:
        """The one JSON object on stdout; nothing else may stand there."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        return json.loads(lines[0], parse_constant=lambda name: _not_json(name))


def run(capsys, *arguments: object) -> Outcome:
    """Run ``fedgraft ARGUMENTS``."""
    capsys.readouterr()
    code = fedgraft.main([str(argument) for argument in arguments])
    return Outcome(code, *capsys.readouterr())


def assert_refused(outcome: Outcome, *words: str, as_json: bool) -> None:
    """Bad input: exit code 2, one error line on stderr, and on stdout ``{"error"}`` with ``--json``, else nothing."""
    assert outcome.code == 2, outcome
    (line,) = outcome.err.splitlines()
    assert line.startswith("fedgraft: error: "), outcome.err
    for word in words:
        assert word in line
    if as_json:
        assert outcome.json() == {"error": line.removeprefix("fedgraft: error: ")}
    else:
        assert outcome.out == ""


def tree(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory, hidden files too: content by path (None for a directory)."""
    return {
        str(path.relative_to(directory)): None if path.is_dir() else path.read_bytes()
        for path in sorted(directory.rglob("*"))
    }


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
