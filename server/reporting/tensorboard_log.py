"""TensorBoard events of a run: scalars, byte counts, graph edits as text, masks and usage as images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from experts.graph.expert_graph import ExpertGraph
from server.reporting.run_log import ClientRecord, RewireRecord, RoundRecord, mean_train_loss, pad_masks

CELL_SIDE = 240  # pixels that one layer's matrix is at least scaled up to
SEPARATOR = 8  # pixels between the layers of a picture
SEPARATOR_COLOR = (0.2, 0.45, 0.85)  # unlike every value of a cell, which is gray


class TensorBoardLog:
    """Writer of event files under ``log_dir/tensorboard``, with the server round as step.

    Args:
        log_dir: log directory of the run.
        resumed: last round of the run that is continued, whose events are shown up to it; None: event files of an
            earlier run are removed, since TensorBoard would mix them.
    """

    def __init__(self, log_dir: Path, *, resumed: int | None = None) -> None:
        folder = Path(log_dir) / "tensorboard"
        for earlier in folder.glob("events.out.tfevents.*") if resumed is None else []:
            earlier.unlink()
        purged = None if resumed is None else resumed + 1
        self._writer = SummaryWriter(str(folder), flush_secs=5, purge_step=purged)
        self._sent: Counter[str] = Counter()

    def recall(self, sent: Mapping[str, int]) -> None:
        """Continue the cumulative bytes of an earlier run from ``sent``."""
        self._sent = Counter(sent)

    def round(self, record: RoundRecord) -> None:
        """Write the scalars of one round: loss, perplexity, bytes, density, drift, epsilon, time, edges per layer."""
        step = record.round
        self._scalar("perplexity/overall", record.perplexity, step)
        self._scalar("loss/overall", mean_train_loss(record.clients), step)
        self._scalar("density/overall", record.density, step)
        self._scalar("time/round_seconds", record.seconds, step)
        self._scalar("privacy/epsilon", record.epsilon, step)
        self._bytes(record)
        for layer, edges in enumerate(record.edges):
            self._scalar(f"edges/layer_{layer:02d}", edges, step)
        self._scalar("edges/total", sum(record.edges), step)
        self._scalar("drift/overall", float(record.drifted), step)
        for layer, divergence in enumerate(record.drift_layers):
            self._scalar(f"drift_routing/layer_{layer:02d}", divergence, step)
        for each in record.attached:
            name = f"attached_visits/layer_{each['layer']:02d}_{each['id']}"
            self._scalar(name, each["visits_over_mean"], step)
        for client in record.clients:
            self._client(client, step)
        self._writer.flush()

    def perplexities(self, clients: Mapping[str, float | None], overall: float, step: int) -> None:
        """Write the held-out perplexities of the final model, at the step after the last round."""
        self._scalar("perplexity/overall", overall, step)
        for name, value in clients.items():
            self._scalar(f"perplexity/{name}", value, step)
        self._writer.flush()

    def rewire(self, record: RewireRecord) -> None:
        """Write the graph edits of a round as a Markdown table and the loss before and after them."""
        self._writer.add_text("graph/edits", edits_table(record), record.round)
        self._scalar("edges/edits", len(record.edits), record.round)
        for name in ("loss_before", "loss_after", "gamma_hat"):
            self._scalar(f"merge/{name}", getattr(record, name), record.round)
        self._writer.flush()

    def pictures(
        self,
        step: int,
        graph: ExpertGraph,
        usage: Sequence[np.ndarray],
        residents: Mapping[str, Sequence[np.ndarray]],
    ) -> None:
        """Write the masks of the global graph and of each client, and the traversals of the graph's edges.

        Args:
            step: server round.
            graph: graph that the clients trained on.
            usage: counts, per layer ``[E, E]``; empty where clients report none.
            residents: experts that each client holds, by its name, bool ``[E]`` per layer.
        """
        experts = graph.num_experts
        self.masks("global", pad_masks(graph.masks, experts_per_layer=experts), step)
        if usage:
            padded = np.zeros((len(experts), max(experts), max(experts)))
            for layer, (counts, mask) in enumerate(zip(usage, graph.masks, strict=True)):
                padded[layer, : len(mask), : len(mask)] = counts * mask
            self.usage(padded, step)
        for name, held in residents.items():
            self.masks(name, pad_masks(graph.restrict(held).masks, experts_per_layer=experts), step)

    def masks(self, name: str, masks: Any, step: int) -> None:
        """Write masks, bool ``[L, E, E]``, as one image ``masks/NAME``: white is an edge or an open root."""
        picture = layer_grid(np.asarray(masks, dtype=np.float32))
        self._writer.add_image(f"masks/{name}", picture, step, dataformats="HWC")

    def usage(self, usage: Any, step: int) -> None:
        """Write traversals ``[L, E, E]`` as an image (square root, scaled per layer) and tokens per expert.

        An expert's tokens are the sum of its column: entries from the router on the diagonal, plus edge traversals.
        """
        counts = np.asarray(usage, dtype=np.float64)
        peaks = np.maximum(counts.max(axis=(1, 2), keepdims=True), np.finfo(np.float64).tiny)
        picture = layer_grid(np.sqrt(counts / peaks).astype(np.float32))
        self._writer.add_image("usage/traversals", picture, step, dataformats="HWC")
        for layer, tokens in enumerate(counts.sum(axis=1)):
            self._histogram(f"tokens_per_expert/layer_{layer:02d}", tokens, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def _bytes(self, record: RoundRecord) -> None:
        for name in ("bytes_up", "bytes_down", "bytes_up_dense", "bytes_down_dense"):
            count = getattr(record, name)
            self._sent[name] += count
            self._scalar(f"bytes/{name[6:]}", count, record.round)
            self._scalar(f"bytes_cumulative/{name[6:]}", self._sent[name], record.round)

    def _client(self, client: ClientRecord, step: int) -> None:
        for tag, value in (
            ("loss", client.train_loss),
            ("perplexity", client.perplexity),
            ("density", client.density),
            ("bytes_up", client.bytes_up),
            ("bytes_down", client.bytes_down),
            ("drift_loss", client.drift_loss),
            ("drift_routing", client.drift_routing),
            ("start_seconds", client.start_seconds),
        ):
            self._scalar(f"{tag}/{client.name}", value, step)
        if client.refused is not None:
            self._writer.add_text(f"refused/{client.name}", client.refused, step)

    def _histogram(self, tag: str, tokens: np.ndarray, step: int) -> None:
        """Write a histogram with one bar per expert: index on the axis, tokens as height."""
        index = np.arange(len(tokens))
        self._writer.add_histogram_raw(
            tag,
            min=0,
            max=max(len(tokens) - 1, 0),
            num=float(tokens.sum()),
            sum=float(tokens @ index),
            sum_squares=float(tokens @ index**2),
            bucket_limits=(index + 0.5).tolist(),
            bucket_counts=tokens.tolist(),
            global_step=step,
        )

    def _scalar(self, tag: str, value: float | None, step: int) -> None:
        """Write ``value``; an absent or non-finite one leaves a gap in the curve."""
        if value is not None and math.isfinite(value):
            self._writer.add_scalar(tag, value, step)


def edits_table(record: RewireRecord) -> str:
    """Format graph edits as a Markdown table; ``|`` in a reason is escaped."""
    if not record.edits:
        return f"round {record.round}: no edit (at most {record.rho_max} allowed)"
    rows = ["| op | layer | p | q | reason |", "|---|---|---|---|---|"]
    for edit in record.edits:
        cells = ("" if edit[key] is None else str(edit[key]) for key in ("op", "layer", "p", "q", "reason"))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def layer_grid(matrices: np.ndarray) -> np.ndarray:
    """Arrange ``[L, E, E]`` values in 0..1 as one RGB image ``[height, width, 3]``, float32.

    Layers run row by row, upscaled without smoothing so that one entry is a visible square, with blue lines around
    each layer.
    """
    layers, experts, _ = matrices.shape
    scale = max(1, math.ceil(CELL_SIDE / experts))
    columns = math.ceil(math.sqrt(layers))
    rows = math.ceil(layers / columns)
    pitch = experts * scale + SEPARATOR
    shape = (rows * pitch + SEPARATOR, columns * pitch + SEPARATOR, 3)
    picture = np.broadcast_to(np.asarray(SEPARATOR_COLOR, dtype=np.float32), shape).copy()
    for layer, matrix in enumerate(matrices):
        top = SEPARATOR + layer // columns * pitch
        left = SEPARATOR + layer % columns * pitch
        tile = np.kron(np.clip(matrix, 0, 1), np.ones((scale, scale), dtype=np.float32))
        picture[top : top + len(tile), left : left + len(tile)] = tile[:, :, None]
    return picture
