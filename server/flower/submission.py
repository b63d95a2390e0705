"""Record of a submitted run, ``submission.json`` in its log directory: run id, SuperLink and run configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.output import write_json
from server.flower.connection import Connection

SUBMISSION_FILE = "submission.json"


@dataclass(frozen=True)
class Submission:
    """A run that was submitted to a SuperLink.

    Attributes:
        run_id: Flower's id of the run.
        connection: SuperLink.
        values: run configuration, with paths of the SuperLink's machine.
        out: folder of the trained model on this machine; empty: none.
        server_folder: ``[HOST:]FOLDER`` with the log directory and the model on the SuperLink's machine; empty: they
            are in the same place on both.
    """

    run_id: str
    connection: Connection
    values: Mapping[str, Any]
    out: str = ""
    server_folder: str = ""

    def write(self, log_dir: Path) -> None:
        """Write the record to a log directory on this machine, which is created."""
        log_dir.mkdir(parents=True, exist_ok=True)
        fields = {
            "run_id": self.run_id,
            "connection": self.connection.settings(),
            "values": dict(self.values),
        }
        write_json(log_dir / SUBMISSION_FILE, fields | {"out": self.out, "server_folder": self.server_folder})


def read_submission(log_dir: Path) -> Submission | None:
    """Read the record in a log directory; None where there is none.

    Raises:
        UserError: it is damaged, or its root certificates are gone.
    """
    path = log_dir / SUBMISSION_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        connection = Connection.of_settings(content.pop("connection"))
        return Submission(connection=connection, **content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"expected the record of a submitted run in {path}, which cannot be read: {error}"
        ) from error
