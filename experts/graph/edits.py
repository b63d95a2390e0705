"""Edits of an expert graph as data, and their JSON form ``{"op", "layer", "p", "q", "reason"}``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from configs.errors import UserError


@dataclass(frozen=True)
class _EdgeEdit:
    """Edit of the edge p -> q.

    Attributes:
        layer: index of the layer.
        p: source expert.
        q: target expert, above p.
        reason: cause of the edit, for the log.
    """

    op: ClassVar[str]
    layer: int
    p: int
    q: int
    reason: str = ""

    def __post_init__(self) -> None:
        if self.layer < 0 or not 0 <= self.p < self.q:
            raise UserError(f"expected a known layer and experts p < q, got {self}")

    def __str__(self) -> str:
        return f"{self.op} {self.layer}:{self.p} -> {self.q}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return _as_dict(self.op, self.layer, self.p, self.q, self.reason)


class AddEdge(_EdgeEdit):
    """Insertion of the edge p -> q."""

    op = "add-edge"


class RemoveEdge(_EdgeEdit):
    """Deletion of the edge p -> q."""

    op = "remove-edge"


@dataclass(frozen=True)
class _SingleEdit:
    """Edit of one expert; in JSON p == q == ``expert``.

    Attributes:
        layer: index of the layer.
        expert: edited expert.
        reason: cause of the edit, for the log.
    """

    op: ClassVar[str]
    layer: int
    expert: int
    reason: str = ""

    def __post_init__(self) -> None:
        _check_known(self, self.layer, self.expert)

    def __str__(self) -> str:
        return f"{self.op} {self.layer}:{self.expert}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return _as_dict(self.op, self.layer, self.expert, self.expert, self.reason)


class OpenRoot(_SingleEdit):
    """Permission for the router to choose an expert."""

    op = "open-root"


class CloseRoot(_SingleEdit):
    """Restriction of an expert to visits along edges."""

    op = "close-root"


@dataclass(frozen=True)
class SpawnExpert:
    """Addition of an expert that is visited wherever ``parent`` is, in addition to the k of a token.

    It starts with the gate and up projections of its parent and a down projection of zero, so that no output changes.
    In JSON p is ``parent`` and q is ``expert``.

    Attributes:
        layer: index of the layer.
        parent: expert whose tokens the new one visits, too.
        expert: number of the new expert: E, E + 1, ... in the order of the plan.
        reason: cause of the edit, for the log.
    """

    op: ClassVar[str] = "spawn-expert"
    layer: int
    parent: int
    expert: int
    reason: str = ""

    def __post_init__(self) -> None:
        _check_known(self, self.layer, self.parent)
        if self.expert <= self.parent:
            raise UserError(f"expected a spawned expert to be numbered above its parent, got {self}")

    def __str__(self) -> str:
        return f"{self.op} {self.layer}:{self.expert} beside {self.parent}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return _as_dict(self.op, self.layer, self.parent, self.expert, self.reason)


class RetireExpert(_SingleEdit):
    """Removal of an expert, whose parents get edges to its children."""

    op = "retire-expert"


@dataclass(frozen=True)
class MergeExperts:
    """Merging of an expert into another one of its layer; in JSON p is ``into`` and q is ``expert``.

    Attributes:
        layer: index of the layer.
        expert: removed expert.
        into: expert that takes over its edges and root.
        reason: cause of the edit, for the log.
    """

    op: ClassVar[str] = "merge-experts"
    layer: int
    expert: int
    into: int
    reason: str = ""

    def __post_init__(self) -> None:
        if self.expert == self.into:
            raise UserError(f"expected p != q to merge two experts, got {self}")
        _check_known(self, self.layer, self.expert, self.into)

    def __str__(self) -> str:
        return f"{self.op} {self.layer}:{self.expert} into {self.into}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return _as_dict(self.op, self.layer, self.into, self.expert, self.reason)


EdgeEdit = AddEdge | RemoveEdge
RootEdit = OpenRoot | CloseRoot
ExpertEdit = RetireExpert | MergeExperts
Edit = EdgeEdit | RootEdit | SpawnExpert | ExpertEdit
_PAIRS: dict[str, type[AddEdge | RemoveEdge | SpawnExpert]] = {
    kind.op: kind for kind in (AddEdge, RemoveEdge, SpawnExpert)
}
_SINGLES: dict[str, type[OpenRoot | CloseRoot | RetireExpert]] = {
    kind.op: kind for kind in (OpenRoot, CloseRoot, RetireExpert)
}
OPERATIONS = (*_PAIRS, *_SINGLES, MergeExperts.op)


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    op: str
    layer: int
    p: int
    q: int
    reason: str = ""


def edits_from_dicts(values: Any) -> list[Edit]:
    """Inverse of ``as_dict`` for a list of edits.

    Raises:
        UserError: no list, other keys, values of other types, an unknown operation, or an edit that fits no graph.
    """
    if not isinstance(values, list):
        raise UserError(f"expected a list of edits, got {type(values).__name__}")
    return [_edit(_fields(value)) for value in values]


def _fields(value: Any) -> _Fields:
    try:
        return _Fields.model_validate(value)
    except ValidationError:
        raise UserError(f"expected an edit with op, layer, p, q and reason, got {str(value)[:200]}") from None


def _edit(fields: _Fields) -> Edit:
    layer, p, q, reason = fields.layer, fields.p, fields.q, fields.reason
    if fields.op in _PAIRS:
        return _PAIRS[fields.op](layer, p, q, reason)
    if fields.op == MergeExperts.op:
        return MergeExperts(layer, q, p, reason)
    if fields.op not in _SINGLES:
        raise UserError(f"expected an edit to be one of {', '.join(OPERATIONS)}, got {fields.op!r}")
    if p != q:
        raise UserError(f"expected p == q for an edit of one expert, got {fields.op} {layer}:{p} {q}")
    return _SINGLES[fields.op](layer, q, reason)


def _as_dict(op: str, layer: int, p: int, q: int, reason: str) -> dict[str, Any]:
    return {"op": op, "layer": layer, "p": p, "q": q, "reason": reason}


def _check_known(edit: object, *numbers: int) -> None:
    if min(numbers) < 0:
        raise UserError(f"expected a known layer and known experts, got {edit}")
