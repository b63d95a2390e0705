"""Train the embedded model again: a byte-level BPE tokenizer and a small Llama on four WikiMix domains.

``python scripts/tools/pretrain_demo.py --out DIR [--minutes 25] [--seed 0] [--json]``. The minutes choose a fixed
number of optimizer steps (sized on two cores), so a rerun does the same work, however long it takes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run from a clone, without installation

from configs.errors import UserError  # noqa: E402
from federated.data import wikimix  # noqa: E402
from models.runtime.precision import bf16_is_faster  # noqa: E402

CONFIG = ROOT / "configs" / "llama_demo.json"
STEPS_PER_MINUTE = 60
BATCH_BLOCKS = 16  # blocks of one optimizer step, dealt evenly to the pre-training domains
TOKENIZER_DOCUMENTS = 1500  # documents of each domain that the tokenizer is trained on
VALID_BLOCKS = 64  # held-out blocks of each domain
PEAK_RATE = 2e-3
SMOOTHING = 0.02  # share of each target spread over the whole vocabulary


def pretraining_domains() -> tuple[str, ...]:
    """The domains that the model is trained on, in the order of ``wikimix.DOMAINS``."""
    return tuple(name for name in wikimix.DOMAINS if name not in wikimix.HELD_OUT)


def train_tokenizer(
    vocab_size: int, context: int, documents_per_domain: int = 1500
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over all domains: ``<s>`` is 0, ``</s>`` is 1, with all 256 bytes, so nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for name in wikimix.DOMAINS for text in wikimix.documents(name, TOKENIZER_DOCUMENTS))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def blocks(
    tokenizer: PreTrainedTokenizerFast,
    domain: str,
    count: int,
    context: int,
    *,
    seed: int = 0,
    split: str = "train",
) -> torch.Tensor:
    """``[count, context]`` token ids: documents one after the other, a BOS before each, cut into full blocks."""
    ids: list[int] = []
    stream = wikimix.stream(domain, seed, split)
    while len(ids) < count * context:
        batch = tokenizer.backend_tokenizer.encode_batch(
            [next(stream) for _ in range(64)], add_special_tokens=False
        )
        ids += [token for document in batch for token in [tokenizer.bos_token_id, *document.ids]]
    return torch.tensor(ids[: count * context]).view(count, context)


def learning_rate(step: int, steps: int, peak: float = PEAK_RATE) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine down to a twentieth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.475 * (1 + math.cos(math.pi * progress)))


def batches(data: dict[str, torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
    """One pass in shuffled order; a batch ``[BATCH_BLOCKS, context]`` holds equally many of each domain."""
    generator = torch.Generator().manual_seed(seed)
    share = BATCH_BLOCKS // len(data)
    shuffled = [rows[torch.randperm(len(rows), generator=generator)] for rows in data.values()]
    for start in range(0, len(shuffled[0]), share):
        yield torch.cat([rows[start : start + share] for rows in shuffled])


def adamw(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def smoothed_loss(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy of ``[B, S, V]`` logits; smoothing keeps unseen words possible."""
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
    """One update on blocks ``[B, context]`` at learning rate ``rate``, in bf16 if ``half``; returns the loss."""
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
    """Train ``model`` in place on one pass over ``data`` (domain -> blocks ``[N, context]``)."""
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


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """exp of the mean next-token loss over blocks ``[N, context]``."""
    model.eval()
    losses = [
        model(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(batch)
        for batch in rows.split(16)
    ]
    return math.exp(sum(losses) / len(rows))


def pretrain(config: LlamaConfig, *, steps: int, seed: int, out: Path, console: Console) -> dict[str, Any]:
    """Train tokenizer and model, save both with ``training.json`` in ``out`` and return what that file holds."""
    torch.manual_seed(seed)
    context, domains = config.max_position_embeddings, pretraining_domains()
    console.print("training the tokenizer")
    tokenizer = train_tokenizer(config.vocab_size, context)
    count = steps * BATCH_BLOCKS // len(domains)
    data = {
        name: blocks(tokenizer, name, count, context, seed=seed)
        for name in track(domains, "generating and encoding text", console=console)
    }
    model = LlamaForCausalLM(config)
    start, processor = time.perf_counter(), time.process_time()
    train(model, data, seed=seed, console=console)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Judged as shipped, weights rounded to bf16, with the arithmetic in fp32; loaded anew because a
    # conversion in place also rounds the rotary frequencies.
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    valid = {name: blocks(tokenizer, name, VALID_BLOCKS, context, split="valid") for name in wikimix.DOMAINS}
    summary = {
        "parameters": model.num_parameters(),
        "steps": steps,
        "tokens": steps * BATCH_BLOCKS * context,
        "seed": seed,
        "seconds": round(seconds),
        "processor_seconds": round(processor),
        "domains": list(domains),
        "held_out": list(wikimix.HELD_OUT),
        "perplexity": {name: round(perplexity(model, rows), 3) for name, rows in valid.items()},
    }
    (out / "training.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def pretrain_into(
    target: Path, config: LlamaConfig, *, steps: int, seed: int, overwrite: bool, console: Console
) -> dict[str, Any]:
    """:func:`pretrain` into a folder beside ``target`` that takes its place only when complete."""
    if target.exists() and not target.is_dir():
        raise UserError(f"expected a folder for --out, got the file {target}; choose another")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(
            f"expected --out to be new or empty, got {target} with files in it; add --overwrite to replace it"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".partial", dir=target.parent))
    try:
        summary = pretrain(config, steps=steps, seed=seed, out=partial, console=console)
        shutil.rmtree(target, ignore_errors=True)
        partial.chmod(0o755)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary


def steps_for(minutes: float) -> int:
    """The fixed number of optimizer steps that stands for ``minutes``; ``UserError`` if there is not even one."""
    if not math.isfinite(minutes) or minutes * STEPS_PER_MINUTE < 0.5:
        raise UserError(
            f"expected --minutes of at least {1 / STEPS_PER_MINUTE:.2f}, got {minutes}; the default is 25"
        )
    return max(1, round(minutes * STEPS_PER_MINUTE))


def load_config(path: Path) -> LlamaConfig:
    """The Llama configuration in a JSON file; ``UserError`` if there is none or it is not JSON."""
    try:
        return LlamaConfig(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"expected a Llama configuration (JSON) in {path}, got {error}; see {CONFIG.name}"
        ) from error


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``arguments`` default to those of the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", "--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument(
        "--minutes", type=float, default=25.0, help="training time on two cores, sets the number of steps"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of initialization, text and order")
    parser.add_argument("--config", type=Path, default=CONFIG, help="Llama configuration (JSON)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the folder")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object on stdout")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Train and save; returns the exit code (2 for bad input)."""
    options = parse(arguments)
    console = Console(stderr=True)
    torch.set_num_threads(2)
    try:
        config, steps = load_config(options.config), steps_for(options.minutes)
        summary = pretrain_into(
            options.out, config, steps=steps, seed=options.seed, overwrite=options.overwrite, console=console
        )
    except UserError as error:
        print(
            json.dumps({"error": str(error)}) if options.json else f"error: {error}",
            file=sys.stdout if options.json else sys.stderr,
        )
        return 2
    if options.json:
        print(json.dumps(summary))
    for name, value in summary["perplexity"].items():
        console.print(f"{name:12} {value:8.3f}{'  held out' if name in wikimix.HELD_OUT else ''}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
