"""``fedgraft generate``: continue a prompt, token by token."""

from __future__ import annotations

from typing import Annotated

import typer

from scripts.shared.console import Device, JsonFlag, Precision, print_result, quiet_libraries


def generate(
    model: Annotated[
        str, typer.Option(help="Directory or hub id of a graph or a plain Hugging Face checkpoint.")
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    precision: Precision = None,
    device: Device = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Continue a prompt; the text streams to stdout as it is made."""
    import torch
    from transformers import TextStreamer

    from models.checkpoints.load import load_causal_lm, load_tokenizer
    from models.runtime.generation import continue_prompt
    from models.runtime.precision import choose_device

    quiet_libraries()
    lm = load_causal_lm(model, precision=precision, device=choose_device(device))
    tokenizer = load_tokenizer(model)
    streamer = None if as_json else TextStreamer(tokenizer, skip_special_tokens=True)
    torch.manual_seed(seed)
    text = continue_prompt(
        lm, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, streamer=streamer
    )
    print_result({"prompt": prompt, "text": text}, as_json=as_json, lines=[])
