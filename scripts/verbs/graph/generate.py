"""``fedgraft generate``: continuation of a prompt, token by token."""

from __future__ import annotations

from typing import Annotated

import typer

from scripts.shared.console import print_result, quiet_libraries
from scripts.shared.options import CausalModel, JsonFlag, RuntimeOptions
from scripts.shared.verb import verb


@verb
def generate(
    model: CausalModel,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0: the most likely token (greedy).")
    ] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    runtime: RuntimeOptions = RuntimeOptions(),
    as_json: JsonFlag = False,
) -> None:
    """Generate a continuation of a prompt; the text streams to stdout."""
    import torch
    from transformers import TextStreamer

    from models.checkpoints.convert import as_checkpoint
    from models.checkpoints.load import load_causal_lm, load_tokenizer
    from models.runtime.generation import continue_prompt
    from models.runtime.precision import choose_device, precision_name

    quiet_libraries()
    model = as_checkpoint(model)
    lm = load_causal_lm(model, precision=runtime.precision, device=choose_device(runtime.device))
    tokenizer = load_tokenizer(model)
    streamer = None if as_json else TextStreamer(tokenizer, skip_special_tokens=True)
    torch.manual_seed(seed)
    text = continue_prompt(
        lm, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, streamer=streamer
    )
    print_result({"prompt": prompt, "text": text, "precision": precision_name(lm)}, as_json=as_json, lines=[])
