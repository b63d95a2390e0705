"""GGUF files are opened by llama.cpp itself."""

from __future__ import annotations

import gguf
import pytest
import torch

from benchmarks.support.llama_cpp import LlamaCpp
from configs.choices import ExportedWeights, ExportFormat
from configs.errors import UserError
from models.checkpoints.load import load_dense, load_tokenizer
from models.export.dense import dense_model
from models.export.gguf_files.storage import round_to_gguf
from models.export.gguf_files.write import architecture_of, write_gguf
from models.export.mixture import mixture_layers, mixture_model
from tests.conftest import tiny_llama
from tests.models.export.test_mixture import LLAMA3
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.paths import ROOT
from tests.support.tiny_graphs import graph_of, random_ids, shared_graph_of
from tests.support.tiny_moes import tiny_moe

DEMO = str(ROOT / "models/demo")
PLAIN = 64
TEXT = "Once upon a time there was a little girl who lived in a village, and her name was 12 (really)."


@pytest.fixture(scope="module")
def tokenizer():
    """Tokenizer of the embedded model."""
    return load_tokenizer(DEMO)


@pytest.fixture(scope="module")
def graph():
    """The embedded model as a graph of 16 experts, of which 4 are shared and 8 visited."""
    return shared_graph_of(load_dense(DEMO, precision="fp32"), num_experts=16, num_shared=4, default_rank=0)


def model_of(graph, to: ExportFormat):
    """Plain model of a format."""
    if to == ExportFormat.DENSE:
        return dense_model(graph)
    return mixture_model(graph, to, mixture_layers(graph, to, random_ids(graph)), 10)


def largest_difference(model, opened: LlamaCpp, ids: list[int]) -> float:
    """Largest difference of all log-probabilities between transformers and llama.cpp, after several prefixes."""
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    ends = (1, 3, len(ids) // 2, len(ids))
    return max(float((opened.log_probabilities(ids[:end]) - expected[end - 1]).abs().max()) for end in ends)


@pytest.mark.parametrize("to", [ExportFormat.DENSE, ExportFormat.MIXTRAL, ExportFormat.QWEN2_MOE])
def test_llama_cpp_computes_what_transformers_computes(tmp_path, tokenizer, graph, to):
    if to == ExportFormat.MIXTRAL:
        graph = graph_of(load_dense(DEMO, precision="fp32"), num_experts=8, visits=4)
    model = model_of(graph, to)
    ids = tokenizer(TEXT).input_ids
    write_gguf(model, tokenizer, tmp_path / "fp32.gguf", ExportedWeights.FP32)
    opened = LlamaCpp(tmp_path / "fp32.gguf", vocab_size=2048, plain_token=PLAIN, context=128)
    assert largest_difference(model, opened, ids) < 1e-4
    # Its own tokenizer gives the same tokens, and its text is the most likely one by transformers.
    answer = opened.generate(TEXT, 8)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert answer["choices"][0]["text"] == tokenizer.decode(expected[0, len(ids) :])
    write_gguf(model, tokenizer, tmp_path / "fp16.gguf", ExportedWeights.FP16)
    round_to_gguf(model, ExportedWeights.FP16)
    opened = LlamaCpp(tmp_path / "fp16.gguf", vocab_size=2048, plain_token=PLAIN, context=128)
    assert largest_difference(model, opened, ids) < 0.05


def test_weights_of_eight_bits_are_read(tmp_path, tokenizer, graph):
    model = model_of(graph, ExportFormat.DENSE)
    path = tmp_path / "q8.gguf"
    write_gguf(model, tokenizer, path, ExportedWeights.Q8_0)
    round_to_gguf(model, ExportedWeights.Q8_0)
    opened = LlamaCpp(path, vocab_size=2048, plain_token=PLAIN, context=128)
    # llama.cpp rounds activations to eight bits, too.
    assert largest_difference(model, opened, tokenizer(TEXT).input_ids) < 0.3
    assert opened.generate("Once upon a time", 8)["usage"]["completion_tokens"] == 8


def test_rope_factors_and_heads_of_another_width_are_applied(tmp_path):
    model = tiny_llama(vocab_size=259, head_dim=16, rope_parameters=LLAMA3)
    tokenizer = byte_tokenizer(("a", "b"), bos_token="<s>", eos_token="</s>")
    write_gguf(model, tokenizer, tmp_path / "x.gguf", ExportedWeights.FP32)
    opened = LlamaCpp(tmp_path / "x.gguf", vocab_size=259, plain_token=64, context=128)
    assert largest_difference(model, opened, random_ids(model, 1, 100)[0].tolist()) < 1e-4


def test_the_chat_template_goes_along(tmp_path):
    tokenizer = byte_tokenizer(("a", "b"), bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    write_gguf(tiny_llama(vocab_size=259), tokenizer, tmp_path / "x.gguf", ExportedWeights.FP32)
    fields = gguf.GGUFReader(str(tmp_path / "x.gguf")).fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template


def test_models_without_an_equal_in_llama_cpp_are_refused():
    assert architecture_of(tiny_llama().config) == architecture_of(tiny_moe("mixtral").config) == "llama"
    assert architecture_of(tiny_moe("qwen2_moe").config) == "qwen2moe"
    for model, words in (
        (tiny_moe("olmoe"), "got a model of type 'olmoe'"),
        (tiny_llama(hidden_act="gelu"), "silu"),
        (tiny_moe("qwen2_moe", head_dim=16), "set `gguf_model` to mixtral"),
        (
            tiny_moe("qwen2_moe", rope_parameters=LLAMA3),
            "type default for the architecture qwen2moe, got 'llama3'",
        ),
        (
            tiny_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "got 'linear'",
        ),
    ):
        with pytest.raises(UserError, match=words):
            architecture_of(model.config)
