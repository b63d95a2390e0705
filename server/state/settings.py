"""Settings of a run, saved at its start and compared when it is continued."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from configs.errors import UserError
from configs.output import write_bytes, write_json
from configs.schema import RunConfig, run_config_defaults

STATE_FOLDER = "state"  # in a log directory
SETTINGS_FILE = "settings.json"
RESUME_FILE = "resume.toml"
# Keys that may differ in a continued run: none of them changes what a round computes. The graph is compared by its
# fingerprint, and clients compare that of the base.
MAY_CHANGE = (
    "base",
    "checkpoint-every",
    "early-stop-delta",
    "early-stop-rounds",
    "graph",
    "keep-best",
    "keep-checkpoints",
    "log-dir",
    "num-threads",
    "out",
    "overwrite",
    "reply-timeout",
    "resume",
    "trace-tokens",
)


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
        run_id: Flower's id of the run that was started first, after which clients name their folders.
        graph: fingerprint of the bootstrapped graph.
        values: run configuration.
    """

    run_id: int
    graph: str
    values: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write ``settings.json`` and ``resume.toml`` in ``folder``, the state folder of a log directory.

        The latter is the run configuration that continues the run: ``flwr run . NAME --run-config resume.toml``.
        """
        write_json(folder / SETTINGS_FILE, asdict(self))
        continued = {**self.values, "log-dir": str(folder.parent.absolute()), "resume": True}
        write_bytes(folder / RESUME_FILE, tomli_w.dumps(continued).encode())

    def check(self, config: RunConfig, graph: str) -> None:
        """Check that a continued run has the same graph and configuration, apart from ``MAY_CHANGE``.

        Raises:
            UserError: names every difference and the keys that may change.
        """
        if graph != self.graph:
            raise UserError(
                f"expected the graph {self.graph[:12]} that the run was started with, got {graph[:12]} in "
                f"{config.graph or 'the cache folder'}; name that graph"
            )
        # A key that the stored settings lack is newer than the run, which had its default.
        stored, found = run_config_defaults() | dict(self.values), config.values()
        changed = [
            f"{key} = {found.get(key)!r} in place of {value!r}"
            for key, value in stored.items()
            if key not in MAY_CHANGE and found.get(key) != value
        ]
        if changed:
            raise UserError(
                f"expected the settings of the run that is continued, got {', '.join(changed)}; only these keys may "
                f"change: {', '.join(MAY_CHANGE)}; state/{RESUME_FILE} in its log directory has all of them"
            )


def read_settings(folder: Path) -> Settings:
    """Read ``settings.json`` in ``folder``.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / SETTINGS_FILE
    try:
        return Settings(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"expected the state of a run, found no {path}; name the log-dir of a run") from None
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"expected the settings of a run in {path}, which cannot be read: {error}") from error
