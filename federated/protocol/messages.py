"""Flower messages of a federation: requests, replies, error codes, and their size in bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from configs.errors import UserError
from federated.protocol.steps import ServerStep, read_step
from federated.updates.update import RefusedUpdate

# Error codes of replies; Flower's own are below 100.
REFUSED = 100  # failure of the client; the reason is the type and message of the exception
RESEND = (
    101  # the client holds another version than the server recorded; the reason is that version, in digits
)
NEEDS_RECIPE = (
    102  # the client requests the recipe of the graph; the reason applies where the server has none
)
BAD_INPUT = (
    103  # invalid input of the user (configuration, data, checkpoint); the reason is the plain message
)

_T = TypeVar("_T")
# Exceptions of reading a record of another kind or a field of another type.
_UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


@dataclass(frozen=True)
class Request:
    """Request of the server to a client.

    Attributes:
        server_round: from 1.
        version: version of the global model after ``steps``.
        graph_hash: digest of the graph after ``steps``.
        base_fingerprint: fingerprint of the bootstrapped checkpoint (see ``models.bootstrap.recipe``).
        steps: server steps since the client's version.
        last: whether this is the last round.
        accepted_round: server round of this client's last update that was aggregated; 0: none.
        copy_hash: hash of the global model after ``steps`` (``federated.protocol.copy_hash``); empty: not compared.
        snapshot: difference of ``version`` from the bootstrapped checkpoint, in place of ``steps``; empty: none.
        recipe: recipe that builds the bootstrapped checkpoint from its dense base; empty unless requested.
        run_id: id of the run whose files the client uses, where this run continues another; 0: its own.
        accepted_rounds: ``accepted_round`` by client index, where the server does not know which one the node is.
    """

    server_round: int
    version: int
    graph_hash: str
    base_fingerprint: str
    steps: Sequence[ServerStep] = ()
    last: bool = False
    accepted_round: int = 0
    copy_hash: str = ""
    snapshot: bytes = b""
    recipe: bytes = b""
    run_id: int = 0
    accepted_rounds: Mapping[int, int] = field(default_factory=dict)

    def of_partition(self, partition: int) -> Request:
        """The request as client ``partition`` reads it, with its own ``accepted_round``."""
        return replace(self, accepted_round=self.accepted_rounds.get(partition, self.accepted_round))


@dataclass(frozen=True)
class Reply:
    """Reply of a client to a request.

    Attributes:
        name: client name, for display.
        partition: index of the client, from 0.
        budget: experts per layer that it holds; 0: all.
        version: version of the global model on its disk.
        graph_hash: digest of that model's graph.
        numbers: counts and losses by name (see ``clients.participant``).
        update: packed change of its experts; empty for an evaluation.
        usage: packed usage counts; empty for an evaluation.
        residents: per layer bool ``[E]``; empty for an evaluation.
        inclusion: inclusion probability of each shipped expert, where below 1: ``"layer.expert" -> pi``.
    """

    name: str
    partition: int
    budget: int
    version: int
    graph_hash: str
    numbers: dict[str, float]
    update: bytes = b""
    usage: bytes = b""
    residents: Sequence[np.ndarray] = ()
    inclusion: dict[str, float] | None = None


def write_request(request: Request) -> RecordDict:
    """Flower records of a request."""
    config: dict[str, str | int | bool] = {
        "server-round": request.server_round,
        "version": request.version,
        "graph-hash": request.graph_hash,
        "base-fingerprint": request.base_fingerprint,
        "last": request.last,
        "accepted-round": request.accepted_round,
        "copy-hash": request.copy_hash,
    }
    if request.run_id:
        config["run-id"] = str(request.run_id)  # Flower's ids exceed its signed integers
    if request.accepted_rounds:
        config["accepted-rounds"] = json.dumps(dict(request.accepted_rounds))
    config |= {f"edits-{step.version}": step.edits_json() for step in request.steps}
    steps = {str(step.version): _to_array(step.packed) for step in request.steps}
    rare = {"snapshot": request.snapshot, "recipe": request.recipe}
    records = {name: ArrayRecord({name: _to_array(data)}) for name, data in rare.items() if data}
    return RecordDict({"config": ConfigRecord(config), "steps": ArrayRecord(steps), **records})


def read_request(content: RecordDict) -> Request:
    """Parse the records of ``write_request``.

    Raises:
        RefusedUpdate: a record or a field is missing.
    """
    try:
        config, arrays = content["config"], content["steps"]
        steps = [
            read_step(int(version), _to_bytes(array), str(config[f"edits-{version}"]))
            for version, array in arrays.items()
        ]
        return Request(
            server_round=int(config["server-round"]),
            version=int(config["version"]),
            graph_hash=str(config["graph-hash"]),
            base_fingerprint=str(config["base-fingerprint"]),
            steps=sorted(steps, key=lambda step: step.version),
            last=bool(config["last"]),
            accepted_round=int(config["accepted-round"]),
            copy_hash=str(config["copy-hash"]),
            run_id=int(str(config.get("run-id", 0))),
            accepted_rounds=_read_rounds(str(config.get("accepted-rounds", "{}"))),
            snapshot=_to_bytes(content["snapshot"]["snapshot"]) if "snapshot" in content else b"",
            recipe=_to_bytes(content["recipe"]["recipe"]) if "recipe" in content else b"",
        )
    except _UNREADABLE as error:
        raise RefusedUpdate(f"a request cannot be read: {error}") from error


def write_reply(reply: Reply) -> RecordDict:
    """Flower records of a reply.

    Every array and record adds some hundred bytes of framing, so that only the update, which may be large, is an array.
    """
    info: dict[str, str | int | bytes] = {
        "name": reply.name,
        "partition": reply.partition,
        "budget": reply.budget,
        "version": reply.version,
        "graph-hash": reply.graph_hash,
    }
    if reply.usage:
        info["usage"] = reply.usage
    if reply.residents:
        info["residents"] = b"".join(np.packbits(held).tobytes() for held in reply.residents)
    inclusion = {"inclusion": MetricRecord(dict(reply.inclusion))} if reply.inclusion else {}
    return RecordDict(
        {
            "arrays": ArrayRecord({"update": _to_array(reply.update)}),
            "numbers": MetricRecord(dict(reply.numbers)),
            "info": ConfigRecord(info),
            **inclusion,
        }
    )


def read_reply(content: RecordDict, num_experts: Sequence[int]) -> Reply:
    """Parse the records of ``write_reply``.

    Raises:
        RefusedUpdate: a record or a field is missing, or a number is not one.
    """
    try:
        info = content["info"]
        return Reply(
            name=_checked(info["name"], str),
            partition=_checked(info["partition"], int),
            budget=_checked(info["budget"], int),
            version=_checked(info["version"], int),
            graph_hash=_checked(info["graph-hash"], str),
            numbers={key: float(value) for key, value in content["numbers"].items()},
            update=_to_bytes(content["arrays"]["update"]),
            usage=_checked(info.get("usage", b""), bytes),
            residents=_read_bits(info["residents"], num_experts) if "residents" in info else [],
            inclusion={key: float(value) for key, value in content.get("inclusion", {}).items()},
        )
    except _UNREADABLE as error:
        raise RefusedUpdate(f"a reply cannot be read: {error}") from error


def message_bytes(message: Message | RecordDict) -> int:
    """Serialized size in bytes of a message, or of its content alone.

    Counts arrays, config and metric records and their framing, and for a message its metadata and error.
    """
    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())


def detach_update(content: RecordDict) -> tuple[RecordDict, bytes]:
    """Split a reply into its other records and the packed update; no bytes where it holds no update."""
    try:
        update = _to_bytes(content["arrays"]["update"])
        rest = ArrayRecord({"update": _to_array(b"")})
    except _UNREADABLE:
        return content, b""
    return RecordDict(dict(content.items()) | {"arrays": rest}), update


def raise_bad_input(code: int, reason: str) -> None:
    """Raise the reason of an error reply as ``UserError`` if its code blames the input of a user."""
    if code in (BAD_INPUT, NEEDS_RECIPE):
        raise UserError(reason)


def _to_array(data: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype="fedgraft.bytes", data=data)


def _to_bytes(array: Array) -> bytes:
    return bytes(array.data)


def _read_rounds(text: str) -> dict[int, int]:
    return {int(client): int(last) for client, last in json.loads(text).items()}


def _checked(value: object, kind: type[_T]) -> _T:
    # No conversion: bytes(n) of an integer would allocate n zeros.
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _read_bits(value: object, num_experts: Sequence[int]) -> list[np.ndarray]:
    data, sizes = _checked(value, bytes), [-(-count // 8) for count in num_experts]
    if len(data) != sum(sizes):
        raise RefusedUpdate(f"expected {sum(sizes)} bytes of residency bits, got {len(data)}")
    parts = np.split(np.frombuffer(data, dtype=np.uint8), np.cumsum(sizes)[:-1])
    return [
        np.unpackbits(part, count=count).astype(bool) for part, count in zip(parts, num_experts, strict=True)
    ]
