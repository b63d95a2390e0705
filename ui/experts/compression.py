"""Commands that prune or merge a checkpoint by an expert list, and their result as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.choices import Action
from configs.errors import UserError
from ui.shared.local_data import local_data


def job_arguments(
    action: str, model: Path, expert_list: Path, out: Path, *, equalize: bool, data: str
) -> list[str]:
    """Arguments of ``fedgraft prune`` or ``fedgraft merge``.

    Args:
        action: ``prune`` or ``merge``.
        model: folder of the checkpoint.
        expert_list: CSV or JSON file.
        out: new folder.
        equalize: whether every layer keeps equally many experts.
        data: text that a merge is calibrated on: ``wikimix``, or a file or folder.

    Raises:
        UserError: the action ``analyze``; data that is neither built in nor a path.
    """
    if action == Action.ANALYZE:
        raise UserError("expected the action prune or merge, got analyze, which removes nothing")
    arguments = [str(action), "--model", str(model), "--expert-list", str(expert_list), "--out", str(out)]
    if action == Action.MERGE:
        arguments += ["--data", local_data(data)]
    return arguments + (["--equalize"] if equalize else [])


def result_text(result: dict[str, Any], warnings: list[str]) -> str:
    """Sentences with the folder, sizes and perplexities of a finished command, and its warnings."""
    share = result["bytes_after"] / result["bytes_before"]
    text = (
        f"Wrote {result['out']}: {result['bytes_after']:,} bytes, {share:.1%} of {result['bytes_before']:,}."
    )
    if found := result.get("perplexity"):
        text += " Perplexity on held-out text: " + ", ".join(
            f"{name} {value:.3f}" for name, value in found.items()
        )
        text += "."
    return " ".join([text, *(f"Warning: {each}." for each in warnings)])
