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
        return {"op": self.op, "layer": self.layer, "p": self.p, "q": self.q, "reason": self.reason}


class AddEdge(_EdgeEdit):
    """Insertion of the edge p -> q."""

    op = "add-edge"


class RemoveEdge(_EdgeEdit):
    """Deletion of the edge p -> q."""

    op = "remove-edge"


@dataclass(frozen=True)
class RetireExpert:
    """Removal of an expert, whose parents get edges to its children; in JSON p == q == ``expert``.

    Attributes:
        layer: index of the layer.
        expert: removed expert.
        reason: cause of the edit, for the log.
    """

    op: ClassVar[str] = "retire-expert"
    layer: int
    expert: int
    reason: str = ""

    def __post_init__(self) -> None:
        if min(self.layer, self.expert) < 0:
            raise UserError(f"expected a known layer and known experts, got {self}")

    def __str__(self) -> str:
        return f"{self.op} {self.layer}:{self.expert}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        expert = self.expert
        return {"op": self.op, "layer": self.layer, "p": expert, "q": expert, "reason": self.reason}


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
        if min(self.layer, self.expert, self.into) < 0:
            raise UserError(f"expected a known layer and known experts, got {self}")

    def __str__(self) -> str:
        return f"{self.op} {self.layer}:{self.expert} into {self.into}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"op": self.op, "layer": self.layer, "p": self.into, "q": self.expert, "reason": self.reason}


EdgeEdit = AddEdge | RemoveEdge
ExpertEdit = RetireExpert | MergeExperts
Edit = EdgeEdit | ExpertEdit
EDGE_EDITS: dict[str, type[AddEdge] | type[RemoveEdge]] = {kind.op: kind for kind in (AddEdge, RemoveEdge)}
EXPERT_OPERATIONS = (RetireExpert.op, MergeExperts.op)


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
    return [_edit(fields) for fields in _fields(values)]


def edge_edits_from_dicts(values: Any) -> list[EdgeEdit]:
    """Inverse of ``as_dict`` for a list of edits of edges.

    Raises:
        UserError: as ``edits_from_dicts``, or an edit of experts.
    """
    return [_edge_edit(fields) for fields in _fields(values)]


def _fields(values: Any) -> list[_Fields]:
    if not isinstance(values, list):
        raise UserError(f"expected a list of edits, got {type(values).__name__}")
    found = []
    for value in values:
        try:
            found.append(_Fields.model_validate(value))
        except ValidationError:
            raise UserError(
                f"expected an edit with op, layer, p, q and reason, got {str(value)[:200]}"
            ) from None
    return found


def _edit(fields: _Fields) -> Edit:
    layer, p, q, reason = fields.layer, fields.p, fields.q, fields.reason
    if fields.op == MergeExperts.op:
        return MergeExperts(layer, q, p, reason)
    if fields.op != RetireExpert.op:
        return _edge_edit(fields, (*EDGE_EDITS, *EXPERT_OPERATIONS))
    if p != q:
        raise UserError(f"expected p == q to retire an expert, got {fields.op} {layer}:{p} {q}")
    return RetireExpert(layer, q, reason)


def _edge_edit(fields: _Fields, known: tuple[str, ...] = tuple(EDGE_EDITS)) -> EdgeEdit:
    if fields.op not in EDGE_EDITS:
        raise UserError(f"expected an edit to be one of {', '.join(known)}, got {fields.op!r}")
    return EDGE_EDITS[fields.op](fields.layer, fields.p, fields.q, fields.reason)
