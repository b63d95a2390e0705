"""The summary of a run, as ``summary.json`` holds it."""

from __future__ import annotations

from typing import Any

SUMMARY: dict[str, Any] = {
    "rounds": 2, "stopped": None,
    "clients": [
        {"name": "letters", "budget": 4, "perplexity_before": 9.5, "perplexity_after": 4.25,
         "perplexity_after_personal": None, "graph_hash": "ab" * 32,
         "drift_rounds": [], "refused": None},
    ],
    "bytes_up": 2000, "bytes_down": 0, "bytes_up_dense": 10_000, "bytes_down_dense": 10_000,
    "edits": 3, "drift_rounds": [], "last": {"round": 2, "perplexity": 4.25},
    "best": {"round": 1, "perplexity": 4.125, "out": "/b"},
    "graph_hash": "ab" * 32, "out": "/out", "log_dir": "/logs",
}  # fmt: skip
