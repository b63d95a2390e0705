"""Training loop of the embedded model: AdamW, warm-up and cosine decay, one pass over the blocks of all domains."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import LlamaForCausalLM

from models.runtime.precision import bf16_is_faster

BATCH_BLOCKS = 16  # blocks of one optimizer step, the same number from each domain
PEAK_RATE = 2e-3
SMOOTHING = 0.02  # share of each target spread over the whole vocabulary


def learning_rate(step: int, steps: int, peak: float = PEAK_RATE) -> float:
    """Learning rate of a step: linear warm-up over 5 % of the steps, cosine decay to 5 % of ``peak``."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.475 * (1 + math.cos(math.pi * progress)))


def batches(data: dict[str, torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
    """Batches ``[BATCH_BLOCKS, context]`` of one shuffled pass, each with the same number of blocks of every domain."""
    generator = torch.Generator().manual_seed(seed)
    share = BATCH_BLOCKS // len(data)
    shuffled = [rows[torch.randperm(len(rows), generator=generator)] for rows in data.values()]
    for start in range(0, len(shuffled[0]), share):
        yield torch.cat([rows[start : start + share] for rows in shuffled])


def adamw(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW of all parameters, with weight decay 0.1 on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def smoothed_loss(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy of logits ``[B, S, V]`` with label smoothing, so that no token has probability zero."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), label_smoothing=SMOOTHING
    )


def train_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    input_ids: torch.Tensor,
    *,
    rate: float,
    half: bool,
) -> float:
    """One optimizer step on blocks ``[B, context]`` at rate ``rate`` (``half``: bf16 autocast); returns its loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        loss = smoothed_loss(model(input_ids=input_ids, use_cache=False).logits, input_ids)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(model: LlamaForCausalLM, data: dict[str, torch.Tensor], *, seed: int, console: Console) -> None:
    """Train ``model`` in place on one pass over ``data``: blocks ``[N, context]`` by domain."""
    optimizer, half = adamw(model), bf16_is_faster()
    steps = len(next(iter(data.values()))) * len(data) // BATCH_BLOCKS
    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn(), TimeRemainingColumn())
    model.train()
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console) as progress:
        task = progress.add_task("training", total=steps, loss="")
        for step, input_ids in enumerate(batches(data, seed)):
            rate = learning_rate(step, steps)
            loss = train_step(model, optimizer, input_ids, rate=rate, half=half)
            progress.update(task, advance=1, loss=f"loss {loss:.3f}")
