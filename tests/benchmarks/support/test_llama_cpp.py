from __future__ import annotations

import torch

from benchmarks.support.llama_cpp import LlamaCpp
from tests.conftest import tiny_llama
from tests.support.tiny_gguf import TOKENS, write_gguf


def test_log_probabilities_are_those_of_transformers_and_text_has_the_length(tmp_path):
    model = tiny_llama()
    write_gguf(model, tmp_path / "x.gguf")
    opened = LlamaCpp(tmp_path / "x.gguf", vocab_size=len(TOKENS), plain_token=40, context=64)
    ids = [0, 7, 20, 33]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(opened.log_probabilities(ids), expected, rtol=0, atol=1e-4)
    answer = opened.generate(ids, 5)
    assert answer["usage"]["completion_tokens"] == 5 and answer["timings"]["predicted_per_second"] > 0
