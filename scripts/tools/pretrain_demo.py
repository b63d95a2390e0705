"""Pretraining of the embedded model: a byte-level BPE tokenizer and a small Llama on four WikiMix domains.

``python scripts/tools/pretrain_demo.py --out DIR [--minutes 25] [--seed 0] [--json]``. The minutes set a fixed
number of optimizer steps (60 per minute, measured on two cores), so that a rerun makes the same steps on any machine.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run from a clone, without installation

from configs.errors import UserError  # noqa: E402
from configs.output import new_directory  # noqa: E402
from federated.data import wikimix  # noqa: E402
from federated.data.blocks import pack_blocks  # noqa: E402
from models.checkpoints.save import save_checkpoint  # noqa: E402
from models.runtime.perplexity import evaluate_loss  # noqa: E402
from scripts.shared.console import option_names  # noqa: E402
from scripts.tools.demo_training import BATCH_BLOCKS, train  # noqa: E402

CONFIG = ROOT / "configs" / "llama_demo.json"
STEPS_PER_MINUTE = 60
TOKENIZER_DOCUMENTS = 1500  # documents of each domain that the tokenizer is trained on
VALID_BLOCKS = 64  # held-out blocks of each domain


def pretraining_domains() -> tuple[str, ...]:
    """Domains of the training text, in the order of ``wikimix.DOMAINS``."""
    return tuple(name for name in wikimix.DOMAINS if name not in wikimix.HELD_OUT)


def train_tokenizer(vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer of all domains: ``<s>`` is 0, ``</s>`` is 1; all 256 bytes, hence no unknown token."""
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
    """Token ids ``[count, context]`` of a domain: a BOS before each document, cut into full blocks."""
    stream = wikimix.stream(domain, seed, split)
    return pack_blocks(stream, tokenizer, block_size=context, max_blocks=count).input_ids


def pretrain(config: LlamaConfig, *, steps: int, seed: int, out: Path, console: Console) -> dict[str, Any]:
    """Train tokenizer and model and save both in ``out``; returns the content of ``training.json`` there."""
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
    out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model.bfloat16(), tokenizer, out)
    summary = {
        "parameters": model.num_parameters(),
        "steps": steps,
        "tokens": steps * BATCH_BLOCKS * context,
        "seed": seed,
        "seconds": round(seconds),
        "processor_seconds": round(processor),
        "domains": list(domains),
        "held_out": list(wikimix.HELD_OUT),
        "perplexity": held_out_perplexity(out, tokenizer, context),
    }
    (out / "training.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def held_out_perplexity(
    checkpoint: Path, tokenizer: PreTrainedTokenizerFast, context: int
) -> dict[str, float]:
    """Perplexity of a checkpoint on held-out blocks of each domain, with its stored weights and fp32 arithmetic.

    The checkpoint is loaded: a conversion of the trained model in place would also round the rotary frequencies.
    """
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    measured = {}
    for name in wikimix.DOMAINS:
        rows = blocks(tokenizer, name, VALID_BLOCKS, context, split="valid")
        measured[name] = round(evaluate_loss(model, rows, rows).perplexity, 3)
    return measured


def steps_for(minutes: float) -> int:
    """Number of optimizer steps of ``minutes`` of training.

    Raises:
        UserError: less than half a step, or a number that is not finite.
    """
    if not math.isfinite(minutes) or minutes * STEPS_PER_MINUTE < 0.5:
        raise UserError(
            f"expected --minutes of at least {1 / STEPS_PER_MINUTE:.2f}, got {minutes}; the default is 25"
        )
    return max(1, round(minutes * STEPS_PER_MINUTE))


def load_config(path: Path) -> LlamaConfig:
    """Llama configuration of a JSON file.

    Raises:
        UserError: no such file, no JSON, or fields that a Llama configuration does not have.
    """
    try:
        return LlamaConfig(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"expected a Llama configuration (JSON) in {path}, got {error}; see {CONFIG.name}"
        ) from error


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line; ``arguments`` default to those of the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", "--output", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument(
        "--minutes",
        type=float,
        default=25.0,
        help="training time on two cores, which sets the number of steps",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of initialization, text and order")
    parser.add_argument("--config", type=Path, default=CONFIG, help="Llama configuration (JSON)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an output directory that is not empty"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object on stdout")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Train the model and save it; returns the exit code: 0, or 2 for bad input."""
    options = parse(arguments)
    console = Console(stderr=True)
    torch.set_num_threads(2)
    try:
        config, steps = load_config(options.config), steps_for(options.minutes)
        with new_directory(options.out, overwrite=options.overwrite) as partial:
            summary = pretrain(config, steps=steps, seed=options.seed, out=partial, console=console)
    except UserError as error:
        message = option_names(str(error))
        print(
            json.dumps({"error": message}) if options.json else f"error: {message}",
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
