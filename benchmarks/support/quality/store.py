"""Files of finished runs, from which an interrupted benchmark goes on, also on another machine or in another checkout.

A file holds the facts that its run depends on: job, settings and the keys of the run configuration that apply to it. It
is used for a job with the same facts. A fact that a file lacks, e.g. a later key of the configuration, is not compared:
its default leaves earlier runs as they were.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.support.quality.result import Run
from benchmarks.support.quality.settings import Job, Settings
from benchmarks.support.runner import commit
from benchmarks.support.stored import digest
from configs.output import write_json
from configs.schema import RunConfig

# Settings that say how many jobs there are and how they run, not what a job computes.
_SEVERAL = ("seeds", "half_seeds", "learning_rates", "jobs", "apart")


def stored_run(
    job: Job, settings: Settings, quick: bool, folders: Sequence[Path], run: Callable[[], Run]
) -> Run:
    """Result of a job: that of a file in ``folders``, else that of ``run``, written to the first folder."""
    facts = facts_of(job, settings, quick)
    found = _finished(job, facts, folders)
    if found is None:
        found = vars(run())
        write_json(_path(folders[0], job, facts), {"facts": facts, "commit": commit(), "run": found})
    return Run(**{**found, "learning_rate": job.learning_rate})


def facts_of(job: Job, settings: Settings, quick: bool) -> dict[str, Any]:
    """Everything that the result of a job depends on, as JSON types, except the code."""
    defaults = RunConfig()
    ours = job.method.endswith("ours")
    facts = {
        "job": vars(job),
        "settings": {name: value for name, value in vars(settings).items() if name not in _SEVERAL},
        "quick": quick,
        "config": defaults.values() if ours else vars(defaults.training),
    }
    return json.loads(json.dumps(facts))


def fits(stored: Any, facts: Any) -> bool:
    """Whether every stored fact is among ``facts``, with the same value."""
    if isinstance(stored, Mapping) and isinstance(facts, Mapping):
        return all(name in facts and fits(value, facts[name]) for name, value in stored.items())
    return stored == facts


def _finished(job: Job, facts: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Any] | None:
    for folder in folders:
        for path in sorted(folder.glob(f"{_stem(job)}-*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            # An empty mapping of keys would fit any keys of the job.
            if record["facts"]["job"] == facts["job"] and fits(record["facts"], facts):
                return record["run"]
    return None


def _path(folder: Path, job: Job, facts: Mapping[str, Any]) -> Path:
    return folder / f"{_stem(job)}-{digest(facts)}.json"


def _stem(job: Job) -> str:
    return f"{job.method.replace(' ', '-')}-{job.seed}"
