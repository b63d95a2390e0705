"""Collection of expert saliency: sums per expert over the tokens of a text, in one resumable pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.errors import UserError
from experts.saliency.measures import Saliency, add_saliency, load_saliency, save_saliency
from models.moe.hooks import OnRows, observing_experts
from models.moe.layers import ExpertRows, MoELayer
from models.moe.views import moe_layers

Batch = tuple[Tensor, Tensor]

# Seconds between two saves of a partial collection.
SAVE_SECONDS = 30.0
# Provenance keys of a partial collection: its progress.
_DONE, _TOKENS = "batches_done", "tokens"


@torch.no_grad()
def collect_saliency(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    provenance: dict[str, Any] | None = None,
    partial: Path | None = None,
    on_rows: OnRows = lambda layer, rows: None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Saliency:
    """Collect the saliency sums of every expert of a model on text.

    One forward pass collects the sums of all measures of ``experts.saliency.measures``; experts run once.

    Args:
        model: any with experts (see ``models.moe.views``), put into evaluation mode.
        batches: ``(input_ids [B, S], token_mask [B, S] bool)``; tokens outside the mask are neither summed nor
            attended to.
        provenance: provenance of the result; the number of masked ``tokens`` is added. A partial collection is resumed
            under the same provenance only.
        partial: file of the sums so far, written every ``SAVE_SECONDS`` and read by the next call with the same
            provenance; None for no file. The caller removes it after saving the result.
        on_rows: further observer of each expert's inputs and outputs.
        on_batch: called with the number of batches done.

    Raises:
        UserError: a model without experts, no token, or a partial file of another collection.
    """
    model.eval()
    layers, provenance = moe_layers(model), dict(provenance or {})
    sums = SaliencySums(layers)
    before, done, sums.tokens = _resume(partial, provenance)
    saved = monotonic()

    def note(layer: MoELayer, rows: ExpertRows) -> None:
        sums.add(layer.ordinal, rows)
        on_rows(layer, rows)

    with observing_experts(layers, note):
        for input_ids, token_mask in islice(batches, done, None):
            sums.start(token_mask)
            ids = input_ids.to(model.device)
            model(input_ids=ids, **attention_mask_kwargs(ids, token_mask), use_cache=False)
            sums.finish()
            done += 1
            on_batch(done)
            if partial is not None and monotonic() - saved > SAVE_SECONDS:
                state = {**provenance, _TOKENS: sums.tokens, _DONE: done}
                save_saliency(_total(before, sums, layers, state), partial)
                saved = monotonic()
    return _checked(_total(before, sums, layers, {**provenance, _TOKENS: sums.tokens}))


class SaliencySums:
    """Running saliency sums over tokens, fp64.

    Attributes:
        values: per layer ``[3, E]``: sums of gate x output norm, output norm, gate.
        counts: per layer ``[E]``, number of tokens routed to the expert.
        token_mask: bool ``[T]``, tokens of the current batch that are summed.
        tokens: number of masked tokens so far.
    """

    def __init__(self, layers: list[MoELayer]) -> None:
        self.values = [torch.zeros(3, layer.num_experts, dtype=torch.float64) for layer in layers]
        self.counts = [torch.zeros(layer.num_experts, dtype=torch.float64) for layer in layers]
        self._rows: dict[int, list[tuple[int, Tensor, Tensor, Tensor]]] = defaultdict(list)
        self.token_mask = torch.empty(0, dtype=torch.bool)
        self.tokens = 0

    def start(self, token_mask: Tensor) -> None:
        """Start a batch with the token mask ``[B, S]``."""
        self.token_mask = token_mask.flatten()
        self.tokens += int(self.token_mask.sum())

    def add(self, index: int, rows: ExpertRows) -> None:
        """Record gates and output norms of one expert of layer ``index``."""
        norms = torch.linalg.vector_norm(rows.outputs, dim=-1, dtype=torch.float32)
        self._rows[index].append((rows.expert, rows.tokens, rows.gates, norms))

    def finish(self) -> None:
        """Add the recorded batch to the sums, once per layer: experts are many and their rows few."""
        for ordinal, rows in self._rows.items():
            experts, tokens, gates, norms = zip(*rows, strict=True)
            sizes = torch.tensor([len(each) for each in tokens])
            expert_N = torch.tensor(experts).repeat_interleave(sizes)
            counts_N = self.token_mask[torch.cat(tokens).cpu()].double()
            gate_N = torch.cat(gates).double().cpu() * counts_N
            norm_N = torch.cat(norms).double().cpu() * counts_N
            for total, value_N in zip(self.values[ordinal], (gate_N * norm_N, norm_N, gate_N), strict=True):
                total += torch.bincount(expert_N, value_N, minlength=len(total))
            self.counts[ordinal] += torch.bincount(expert_N, counts_N, minlength=len(self.counts[ordinal]))
        self._rows.clear()


def attention_mask_kwargs(input_ids: Tensor, token_mask: Tensor) -> dict[str, Tensor]:
    """Keyword arguments with the attention mask; none without padding, which lets the model take its fastest path."""
    return (
        {} if bool(token_mask.all()) else {"attention_mask": token_mask.to(torch.int64).to(input_ids.device)}
    )


def _total(before: Saliency | None, sums: SaliencySums, layers: list[MoELayer], provenance: dict) -> Saliency:
    widest = max(layer.num_experts for layer in layers)

    def stacked(rows: list[Tensor]) -> np.ndarray:
        padded = [np.pad(row.numpy(), (0, widest - len(row)), constant_values=np.nan) for row in rows]
        return np.stack(padded)

    reap, ean, gates = (stacked([values[index] for values in sums.values]) for index in range(3))
    counts = stacked(sums.counts)
    decoders = [layer.decoder for layer in layers]
    shared = tuple(layer.num_shared for layer in layers)
    found = Saliency(reap, counts, ean, counts.copy(), gates, decoders, provenance, shared)
    return found if before is None else replace(add_saliency([before, found]), provenance=provenance)


def _checked(saliency: Saliency) -> Saliency:
    if not saliency.freq[saliency.present].any():
        raise UserError("expected text to collect saliency on, got no token; check the data")
    return saliency


def _resume(partial: Path | None, provenance: dict[str, Any]) -> tuple[Saliency | None, int, int]:
    """Sums of an earlier call, with its number of batches and of masked tokens."""
    if partial is None or not partial.exists():
        return None, 0, 0
    before = load_saliency(partial)
    theirs = dict(before.provenance)
    done, tokens = (theirs.pop(key, None) for key in (_DONE, _TOKENS))
    if theirs != provenance or not isinstance(done, int) or not isinstance(tokens, int):
        raise UserError(
            f"expected {partial} to be of this collection, got one of other options or another model; delete it to "
            "start again"
        )
    return replace(before, provenance=provenance), done, tokens
