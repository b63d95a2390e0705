"""Runs of GGUF files by llama.cpp, through the package xllamacpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class LlamaCpp:
    """GGUF file opened by llama.cpp on the CPU, with keys and values of the attention in fp32.

    Args:
        path: GGUF file.
        vocab_size: entries of its vocabulary.
        plain_token: number of a token of ASCII characters.
        context: tokens of the longest text.
        threads: threads of the computation.
    """

    def __init__(
        self, path: Path, *, vocab_size: int, plain_token: int, context: int = 512, threads: int = 1
    ):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_gpu_layers, params.n_parallel = context, 0, 1
        params.warmup, params.fit_params, params.verbosity = False, False, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cpuparams.poll = 0
        self.vocab_size, self.plain_token = vocab_size, plain_token
        self._server = xllamacpp.Server(params)

    def log_probabilities(self, ids: list[int]) -> Tensor:
        """Log-probabilities ``[V]``, fp32, of the token after ``ids``."""
        # The probabilities are those before the bias; without it some chosen tokens, as half a character, return none.
        choice = {"temperature": 0.0, "logit_bias": [[self.plain_token, 1e6]]}
        answer = self._complete(ids, n_predict=1, n_probs=self.vocab_size, **choice)
        found = torch.full((self.vocab_size,), float("nan"))
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def generate(self, prompt: str | list[int], tokens: int) -> dict[str, Any]:
        """Most likely continuation of ``tokens`` tokens: ``{"choices": [{"text"}], "timings", ...}``."""
        return self._complete(prompt, n_predict=tokens, temperature=0.0, ignore_eos=True)

    def _complete(self, prompt: str | list[int], **options: Any) -> dict[str, Any]:
        plain = {"cache_prompt": False, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return self._server.handle_completions({"prompt": prompt, **plain, **options})
