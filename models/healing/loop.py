"""Training of an expert graph by distillation from its dense base, continued from a saved state.

Shape suffixes: T tokens, D hidden width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from configs.choices import HealingLoss
from configs.errors import UserError
from models.healing.losses import hidden_distance, logit_divergence
from models.healing.options import HealingOptions
from models.healing.state import Progress, load_state, save_state
from models.healing.straight_through import straight_through
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

# Steps after which the number of steps is computed from their time.
TIMED_STEPS = 3
# Most tokens of one forward and backward pass, whose activations are in memory.
_PASS_TOKENS = 512


@dataclass(frozen=True)
class Distillation:
    """Models and text of a healing.

    Attributes:
        graph: student; its trained parameters require gradients.
        dense: teacher.
        input_ids: training text, ``[N, S]``.
        token_mask: bool ``[N, S]``, False at padding.
        autocast: run matrix products in bf16.
    """

    graph: FedGraftForCausalLM
    dense: PreTrainedModel
    input_ids: Tensor
    token_mask: Tensor
    autocast: bool = False


def distill(
    job: Distillation,
    parameters: Mapping[str, nn.Parameter],
    options: HealingOptions,
    *,
    state_file: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Progress:
    """Train ``parameters`` in place.

    The model stays in evaluation mode, and the order of blocks follows from the seed and the step, so that a continued
    run equals an uninterrupted one.

    Args:
        job: models and text.
        parameters: trained parameters by name.
        options: options of healing.
        state_file: file of the state, read at the start where it exists and written while training; None: none.
        settings: facts of the run that a continuation must have, too.
        on_step: called with the steps done and their total (0: not yet known).

    Raises:
        UserError: a loss or gradient that is not finite, a state of other settings.
    """
    optimizer = AdamW(parameters.values(), lr=options.learning_rate, weight_decay=0.0)
    progress, settings = Progress(total=options.steps), settings or {}
    if state_file is not None and state_file.exists():
        progress = load_state(state_file, parameters, optimizer, settings)
        progress.total = progress.total or options.steps
    saved = time.monotonic()
    with straight_through(job.graph):
        while not progress.total or progress.step < progress.total:
            _timed_step(job, list(parameters.values()), optimizer, progress, options)
            on_step(progress.step, progress.total)
            if state_file is not None and time.monotonic() - saved >= options.save_seconds:
                save_state(state_file, parameters, optimizer, progress, settings)
                saved = time.monotonic()
    return progress


def rate_at(step: int, total: int, options: HealingOptions) -> float:
    """Learning rate of the step with index ``step``: linear warm-up, then a cosine to 0; ``total`` 0: not known."""
    warmup = min(options.warmup_steps, total // 4) if total else options.warmup_steps
    if step < warmup:
        return options.learning_rate * (step + 1) / (warmup + 1)
    if not total:
        return options.learning_rate
    done = (step - warmup) / max(1, total - warmup)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def blocks_at(step: int, count: int, options: HealingOptions) -> Tensor:
    """Indices ``[batch_size]`` of the blocks of a step among ``count``: every block once per epoch, shuffled."""
    positions = torch.arange(step * options.batch_size, (step + 1) * options.batch_size)
    epochs = positions // count
    parts = []
    for epoch in epochs.unique().tolist():
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        parts.append(order[positions[epochs == epoch] % count])
    return torch.cat(parts)


def _timed_step(
    job: Distillation,
    parameters: list[nn.Parameter],
    optimizer: AdamW,
    progress: Progress,
    options: HealingOptions,
) -> None:
    """One optimizer step; updates ``progress``."""
    start, core_start = time.monotonic(), time.process_time()
    chosen = blocks_at(progress.step, len(job.input_ids), options)
    count = int(job.token_mask[chosen].sum())
    optimizer.zero_grad()
    try:
        loss = sum(_backward(job, *each, count, options) for each in _passes(job, chosen))
    except FloatingPointError as error:
        raise UserError(f"expected finite router logits, got: {error}; lower the `learning_rate`") from error
    norm = float(nn.utils.clip_grad_norm_(parameters, options.max_grad_norm or math.inf))
    if not math.isfinite(norm) or not math.isfinite(loss):
        raise UserError(
            f"expected a finite loss and gradient in step {progress.step + 1}, got a loss of {loss} and a gradient of "
            f"norm {norm}; lower the `learning_rate`"
        )
    optimizer.param_groups[0]["lr"] = rate_at(progress.step, progress.total, options)
    optimizer.step()
    progress.step, progress.tokens = progress.step + 1, progress.tokens + count
    progress.losses.append(loss)
    progress.seconds += time.monotonic() - start
    progress.core_seconds += time.process_time() - core_start
    if not progress.total and progress.step >= TIMED_STEPS:
        wanted = options.minutes * 60 / (progress.seconds / progress.step)
        progress.total = max(progress.step, int(wanted))


def _passes(job: Distillation, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and mask ``[B, S]`` of the blocks of each forward and backward pass."""
    size = max(1, _PASS_TOKENS // job.input_ids.shape[1])
    for part in chosen.split(size):
        yield job.input_ids[part], job.token_mask[part]


def _backward(
    job: Distillation, input_ids: Tensor, token_mask: Tensor, count: int, options: HealingOptions
) -> float:
    """Accumulate the gradient of one pass; returns its part of the loss per token of a step of ``count`` tokens."""
    ids, mask = input_ids.to(job.graph.device), token_mask.flatten().to(job.graph.device)
    with torch.autocast(job.graph.device.type, dtype=torch.bfloat16, enabled=job.autocast):
        with torch.no_grad():
            teachers = _hidden_states(job.dense, ids, mask, options)
        students = _hidden_states(job.graph, ids, mask, options)
        loss = students[-1].new_zeros((), dtype=torch.float32)
        if options.loss != HealingLoss.HIDDEN:
            heads = [model.get_output_embeddings().weight for model in (job.graph, job.dense)]
            loss = loss + logit_divergence(
                students[-1], heads[0], teachers[-1], heads[1], options.temperature
            )
        if options.loss != HealingLoss.KL:
            loss = loss + options.hidden_weight * hidden_distance(students, teachers)
    loss = loss / count
    loss.backward()
    return float(loss.detach())


def _hidden_states(
    model: PreTrainedModel, ids: Tensor, mask_T: Tensor, options: HealingOptions
) -> list[Tensor]:
    """Hidden states ``[T, D]`` of tokens that are no padding: after each layer, or after the last alone."""
    wanted = options.loss != HealingLoss.KL
    output = model.model(input_ids=ids, use_cache=False, output_hidden_states=wanted)
    states = output.hidden_states[1:] if wanted else [output.last_hidden_state]
    return [state.flatten(0, 1)[mask_T] for state in states]
