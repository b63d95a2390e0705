"""Selection of experts by the form of the page, with the rules of ``fedgraft experts select``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.choices import Action, Metric, SelectionMode
from configs.errors import UserError
from experts.saliency.measures import Saliency, check_same_model, load_saliency
from experts.selection.choice import read_selection
from experts.selection.expert_list import CSV_FILE, ExpertList
from experts.selection.rules import SelectionRules, free_experts, select_experts
from ui.shared.jobs import command_line

MOST_FILES = 4


@dataclass(frozen=True, eq=False)
class SaliencyFile:
    """A saliency file of the session.

    Attributes:
        name: name of the file, by which lists and commands refer to it.
        saliency: its content.
    """

    name: str
    saliency: Saliency


@dataclass(frozen=True)
class SelectionForm:
    """Fields of the page, named as the options of ``fedgraft experts select``; ranks are text, empty for no limit."""

    metric: str = Metric.REAP
    selection_mode: str = SelectionMode.PER_LAYER
    action: str = Action.PRUNE
    n_prune: float | None = None
    min_rank: str = ""
    max_rank: str = ""
    ignore_experts: str = ""
    guard_top: float | None = None

    def rules(self) -> SelectionRules:
        """Selection rules.

        Raises:
            UserError: a field out of range.
        """
        return read_selection(
            model_wide=self.selection_mode == SelectionMode.MODEL_WIDE,
            action=self.action,
            n_prune=_whole("n_prune", self.n_prune),
            min_rank=_rank("min_rank", self.min_rank),
            max_rank=_rank("max_rank", self.max_rank),
            guard_top=float(self.guard_top or 0),
            ignore_experts=self.ignore_experts or "",
        )

    def options(self) -> list[str]:
        """Options of ``fedgraft experts select`` with the values of the form; defaults are left out."""
        given = {
            "--metric": self.metric,
            "--selection-mode": "" if self.selection_mode == SelectionMode.PER_LAYER else self.selection_mode,
            "--action": "" if self.action == Action.PRUNE else self.action,
            "--n-prune": _whole("n_prune", self.n_prune) or "",
            "--min-rank": self.min_rank.strip(),
            "--max-rank": self.max_rank.strip(),
            "--ignore-experts": self.ignore_experts,
            "--guard-top": float(self.guard_top) if self.guard_top else "",
        }
        return [part for name, value in given.items() if value != "" for part in (name, str(value))]


def read_files(paths: Sequence[Path]) -> list[SaliencyFile]:
    """Read saliency files of one model.

    Raises:
        UserError: none or more than ``MOST_FILES``, two of one name, a malformed file, files of different models.
    """
    if not 1 <= len(paths) <= MOST_FILES:
        raise UserError(f"expected 1 to {MOST_FILES} saliency files, got {len(paths)}")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"expected files of different names, got {', '.join(names)}; rename one")
    found = [SaliencyFile(path.name, _load(path)) for path in paths]
    check_same_model([each.saliency for each in found])
    return found


def select(files: Sequence[SaliencyFile], form: SelectionForm) -> ExpertList:
    """Rank the experts and select those to remove.

    Raises:
        UserError: as ``SelectionForm.rules`` and ``select_experts``.
    """
    saliencies = [each.saliency for each in files]
    return select_experts(saliencies, form.metric, form.rules(), files=[each.name for each in files])


def marks(chosen: ExpertList, saliency: Saliency, rules: SelectionRules) -> np.ndarray:
    """Keys of ``ui.shared.heat_map.MARKS`` per expert, str ``[L, E]``: removed, exempt by a rule, shared or kept."""
    free = free_experts(chosen.rank_sum, saliency.routed, rules)
    kept = np.where(free, "k", np.where(saliency.routed, "x", "s"))
    removed = np.isin(chosen.actions, ("prune", "merge"))
    return np.where(removed, chosen.actions.astype("<U1"), kept)


def command_lines(files: Sequence[SaliencyFile], form: SelectionForm, model: str | None) -> str:
    """Commands that write the same expert list, in the folder of the saliency files, and the smaller checkpoint."""
    saliency = [part for each in files for part in ("--saliency", each.name)]
    lines = [command_line("experts", "select", *saliency, *form.options(), "--out", "selection")]
    if form.action != Action.ANALYZE:
        data = ["--data", "wikimix"] if form.action == Action.MERGE else []
        chosen = ["--expert-list", f"selection/{CSV_FILE}", *data, "--out", f"{form.action}d"]
        lines.append(command_line(str(form.action), "--model", model or "MODEL", *chosen))
    return "\n".join(lines)


def _load(path: Path) -> Saliency:
    try:
        return load_saliency(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from None


def _rank(field: str, text: str) -> float | None:
    try:
        return float(text) if text.strip() else None
    except ValueError:
        raise UserError(f"expected `{field}` to be a number or empty, got {text!r}") from None


def _whole(field: str, value: float | None) -> int:
    if value is None:
        return 0
    if value != int(value):
        raise UserError(f"expected `{field}` to be a whole number, got {value}")
    return int(value)
