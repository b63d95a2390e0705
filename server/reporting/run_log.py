"""Log files of a run and their readers; `logs/README.md` describes each file."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.output import finite, replacing, write_bytes

if TYPE_CHECKING:
    from federated.wire.packed_stats import PackedStats

ROUNDS_FILE = "rounds.jsonl"
MASK_FILE = "mask_debug.npy"
TRACE_FILE = "expert_call_trace.json"
PACK_FILE = "pack_sizes.txt"
TRACE_KEYS = ("sequence", "layer", "token", "experts", "parents", "weights")
EDIT_KEYS = ("op", "layer", "p", "q", "reason")
PACK_COLUMNS = ("round", "client", "raw_bytes", "packed_bytes", "ratio", "entropy_floor_bytes")
_PACK_ROW = "{:>6}  {:<24}  {:>14}  {:>14}  {:>10}  {:>20}\n"


@dataclass(frozen=True)
class ClientRecord:
    """Metrics of one client in a round.

    Bytes are as sent on the wire, framing included; ``update_bytes`` of ``bytes_up`` are its packed update, with
    entropy floor ``update_floor_bytes``. ``refused`` is the reason of a refusal, else None.
    ``drift_loss`` (nats) and ``drift_routing`` (bits) are the statistics of the detection of drift, ``drifted`` whether
    one counts as drift. ``start_seconds`` are those from the start of the client's process to its first training
    step.
    """

    name: str
    budget: int
    weight: float
    train_loss: float | None
    perplexity: float | None
    bytes_up: int
    bytes_down: int
    density: float | None
    refused: str | None = None
    update_bytes: int | None = None
    update_floor_bytes: int | None = None
    drift_loss: float | None = None
    drift_routing: float | None = None
    drifted: bool = False
    start_seconds: float | None = None


@dataclass(frozen=True)
class RoundRecord:
    """Metrics of one server round.

    Bytes are totals over clients; ``*_dense`` are those of dense FedAvg in bf16. ``step_bytes`` is the size of the
    server's packed step, with entropy floor ``step_floor_bytes``. ``perplexity`` is token-weighted over the
    clients, ``edges`` holds one count per layer, ``stopped`` the reason if the run ended after this round before
    the last planned one, ``drifted`` whether the federation has drifted, ``drift_layers`` the divergence of routing
    per layer in bits, ``attached`` the visits of each attached expert in this round over the mean of its layer's
    experts, see ``server.strategies.growth.attached_visits``. ``epsilon`` and ``delta`` are those of client-level
    differential privacy of the model after this round; None without such a guarantee.
    """

    round: int
    seconds: float
    bytes_up: int
    bytes_down: int
    bytes_up_dense: int
    bytes_down_dense: int
    density: float | None
    edges: Sequence[int]
    graph_version: int
    graph_hash: str
    clients: Sequence[ClientRecord]
    perplexity: float | None
    stopped: str | None = None
    step_bytes: int | None = None
    step_floor_bytes: int | None = None
    drifted: bool = False
    drift_layers: Sequence[float] = ()
    attached: Sequence[Mapping[str, float]] = ()
    epsilon: float | None = None
    delta: float | None = None


@dataclass(frozen=True)
class RewireRecord:
    """Graph edits of a round and the server's validation loss (nats per token) before and after them.

    Attributes:
        edits: edits that were made; empty where they raised the loss too far.
        proposed: edits that were proposed.
    """

    round: int
    rho_max: int
    edits: Sequence[Mapping[str, Any]]
    loss_before: float | None = None
    loss_after: float | None = None
    gamma_hat: float | None = None
    proposed: Sequence[Mapping[str, Any]] = ()


class RunLog:
    """Writer of a run's log files.

    Args:
        log_dir: folder of the files; created where absent.
        num_layers: layers of the model.
        experts_per_layer: E of each layer.
        resumed: last round of the run that is continued: lines of later rounds are removed; None: all files are.
    """

    def __init__(
        self, log_dir: Path, *, num_layers: int, experts_per_layer: Sequence[int], resumed: int | None = None
    ) -> None:
        if len(experts_per_layer) != num_layers:
            raise ValueError(f"expected {num_layers} expert counts, got {len(experts_per_layer)}")
        self.log_dir = Path(log_dir)
        self.experts_per_layer = list(experts_per_layer)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        if resumed is None:
            clear_run(self.log_dir)
        else:
            _cut(self.log_dir, resumed)

    def round(self, record: RoundRecord) -> None:
        """Append one line to ``rounds.jsonl`` and flush it to disk."""
        content = dataclasses.asdict(record) | {"train_loss": mean_train_loss(record.clients)}
        _append(self.log_dir / ROUNDS_FILE, _to_json(content) + "\n")

    def rewire(self, record: RewireRecord) -> None:
        """Write ``merge_roundN.json``. Raises ValueError for an edit with other keys than EDIT_KEYS."""
        content = dataclasses.asdict(record)
        for name in ("edits", "proposed"):
            content[name] = [_with_keys(edit, EDIT_KEYS, "edit") for edit in content[name]]
        write_atomically(self.log_dir / f"merge_round{record.round}.json", _to_json(content, indent=2) + "\n")

    def mask_debug(self, masks: Sequence[Any] | np.ndarray) -> None:
        """Write ``mask_debug.npy``, bool ``[L, E, E]``, from one bool ``[E_l, E_l]`` mask per layer.

        Where E differs by layer the smaller masks are padded with False.
        Raises ValueError for a mask of another shape or with an entry below the diagonal.
        """
        padded = pad_masks(masks, experts_per_layer=self.experts_per_layer)
        with replacing(self.log_dir / MASK_FILE) as file:
            np.save(file, padded)

    def call_trace(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Write ``expert_call_trace.json``, one entry per token and layer with the keys of TRACE_KEYS.

        Raises ValueError for an entry with other keys.
        """
        lines = [_to_json(_with_keys(entry, TRACE_KEYS, "trace entry")) for entry in entries]
        write_atomically(self.log_dir / TRACE_FILE, "[\n" + ",\n".join(lines) + "\n]\n")

    def pack_sizes(self, round: int, client: str, stats: PackedStats) -> None:
        """Append one line to ``pack_sizes.txt`` (with a header line first)."""
        path = self.log_dir / PACK_FILE
        ratio = stats.raw_bytes / stats.packed_bytes if stats.packed_bytes else math.nan
        name = "_".join(client.split())  # columns are separated by spaces
        row = (round, name, stats.raw_bytes, stats.packed_bytes, f"{ratio:.3f}")
        header = "" if path.exists() else _PACK_ROW.format(*PACK_COLUMNS)
        _append(path, header + _PACK_ROW.format(*row, f"{stats.entropy_floor_bytes:.0f}"))


def read_rounds(log_dir: Path) -> list[dict[str, Any]]:
    """Read the complete lines of ``rounds.jsonl``, oldest first; an unfinished last line is skipped."""
    path = Path(log_dir) / ROUNDS_FILE
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.splitlines() if line]


def read_rewirings(log_dir: Path) -> list[dict[str, Any]]:
    """Read all ``merge_roundN.json`` files, by round."""
    paths = Path(log_dir).glob("merge_round*.json")
    rewirings = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(rewirings, key=lambda each: each["round"])


def mean_train_loss(clients: Sequence[ClientRecord]) -> float | None:
    """Weighted mean training loss (nats per token) over the clients that reported one; None without any."""
    known = [(c.weight, c.train_loss) for c in clients if c.train_loss is not None]
    total = sum(weight for weight, _ in known)
    return sum(weight * loss for weight, loss in known) / total if total else None


def clear_run(log_dir: Path) -> None:
    """Remove the files of a RunLog from ``log_dir``; other files stay."""
    names = [ROUNDS_FILE, MASK_FILE, TRACE_FILE, PACK_FILE]
    for path in [*map(Path(log_dir).joinpath, names), *Path(log_dir).glob("merge_round*.json")]:
        path.unlink(missing_ok=True)


def _cut(log_dir: Path, last: int) -> None:
    """Remove what a run wrote about rounds after ``last``, which it repeats."""
    rows = [row for row in read_rounds(log_dir) if row["round"] <= last]
    write_atomically(log_dir / ROUNDS_FILE, "".join(_to_json(row) + "\n" for row in rows))
    sizes = log_dir / PACK_FILE
    if sizes.exists():
        lines = sizes.read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomically(sizes, "".join(line for line in lines if _is_kept(line, last)))
    for rewiring in read_rewirings(log_dir):
        if rewiring["round"] > last:
            (log_dir / f"merge_round{rewiring['round']}.json").unlink()


def _is_kept(line: str, last: int) -> bool:
    """Whether a complete line of ``pack_sizes.txt`` is the header or belongs to a round up to ``last``."""
    number = line.split(maxsplit=1)[0] if line.strip() else ""
    return line.endswith("\n") and (not number.isdigit() or int(number) <= last)


def pad_masks(masks: Sequence[Any] | np.ndarray, *, experts_per_layer: Sequence[int]) -> np.ndarray:
    """Stack one ``[E_l, E_l]`` mask per layer to bool ``[L, E, E]``, E the largest; padding is False.

    Raises ValueError for a wrong shape or an entry below the diagonal.
    """
    if len(masks) != len(experts_per_layer):
        raise ValueError(f"expected {len(experts_per_layer)} masks, got {len(masks)}")
    largest = max(experts_per_layer, default=0)
    stacked = np.zeros((len(masks), largest, largest), dtype=bool)
    for layer, (mask, experts) in enumerate(zip(masks, experts_per_layer, strict=True)):
        mask = np.asarray(mask).astype(bool)
        if mask.shape not in ((experts, experts), (largest, largest)):
            raise ValueError(
                f"expected the mask of layer {layer} to be [{experts}, {experts}], got {mask.shape}"
            )
        if np.tril(mask, -1).any():
            raise ValueError(
                f"expected an upper-triangular mask in layer {layer}, got an edge below the diagonal"
            )
        stacked[layer, : len(mask), : len(mask)] = mask
    return stacked


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of ``path`` in one step: readers see the old or the new content."""
    write_bytes(path, text.encode())


def _append(path: Path, text: str) -> None:
    """Append whole text and flush it to disk; after a failure the file is as before."""
    with path.open("ab", buffering=0) as stream:
        size = stream.tell()
        try:
            data = text.encode()
            if (written := stream.write(data)) != len(data):
                raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes written to {path}")
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(size)
            raise


def _with_keys(entry: Mapping[str, Any], keys: Sequence[str], what: str) -> dict[str, Any]:
    if set(entry) != set(keys):
        raise ValueError(f"expected the keys {sorted(keys)} in a {what}, got {sorted(entry)}")
    return {key: entry[key] for key in keys}


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(finite(value), indent=indent, allow_nan=False, ensure_ascii=False)
