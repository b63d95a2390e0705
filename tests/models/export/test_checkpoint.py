from __future__ import annotations

import gguf
import pytest

from configs.choices import ExportedWeights, ExportFormat
from configs.errors import UserError
from models.checkpoints.save import save_checkpoint
from models.export.checkpoint import ExportRequest, check_export, export_checkpoint
from models.export.pipeline import ExportText
from tests.conftest import tiny_llama
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.tiny_graphs import graph_of, random_ids, shared_graph_of


def request_of(graph, tmp_path, **options) -> ExportRequest:
    """Export of a graph that is saved with a byte-level tokenizer."""
    (tmp_path / "graph").mkdir()
    save_checkpoint(graph, byte_tokenizer(("a", "b"), bos_token="<s>", eos_token="</s>"), tmp_path / "graph")
    return ExportRequest(str(tmp_path / "graph"), tmp_path / "out", **options)


def text_of(model) -> ExportText:
    """Random text."""
    ids = random_ids(model)
    return ExportText(ids[:2], ids, ids)


@pytest.mark.parametrize(("shared", "architecture"), [(False, "llama"), (True, "qwen2moe")])
def test_a_gguf_file_holds_the_format_that_has_a_shared_expert_where_the_graph_has_some(
    tmp_path, shared, architecture
):
    base = tiny_llama(vocab_size=259)
    graph = shared_graph_of(base, default_rank=0) if shared else graph_of(base, visits=2)
    request = request_of(graph, tmp_path, to=ExportFormat.GGUF)
    check_export(request)
    report = export_checkpoint(request, text_of(graph))
    assert report["file"] == str(tmp_path / "out" / "model-fp16.gguf") and report["weights"] == "fp16"
    fields = gguf.GGUFReader(report["file"]).fields
    assert fields["general.architecture"].contents() == architecture
    assert fields[f"{architecture}.expert_used_count"].contents() == 2
    assert report["exact"] and 0 < report["mean_kl"] < 0.1


def test_a_plain_model_becomes_a_gguf_file(tmp_path):
    model = tiny_llama(vocab_size=259)
    request = request_of(model, tmp_path, to=ExportFormat.GGUF, weights=ExportedWeights.FP32)
    check_export(request)
    report = export_checkpoint(request, text_of(model))
    assert report["mean_kl"] == 0 and report["router_exponent"] is None
    assert gguf.GGUFReader(report["file"]).fields["general.architecture"].contents() == "llama"


def test_weights_of_eight_bits_need_a_gguf_file(tmp_path):
    request = request_of(graph_of(), tmp_path, to=ExportFormat.MIXTRAL, weights=ExportedWeights.Q8_0)
    with pytest.raises(UserError, match="for mixtral, got q8_0; set `to` to gguf"):
        check_export(request)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    request = request_of(graph_of(), tmp_path, to=ExportFormat.GGUF)
    monkeypatch.setattr("models.export.checkpoint.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="expected the package gguf to write.*install.sh gguf"):
        check_export(request)


def test_a_tokenizer_that_a_gguf_file_cannot_hold_leaves_nothing(tmp_path, tiny_graph_dir):
    request = ExportRequest(str(tiny_graph_dir), tmp_path / "out", to=ExportFormat.GGUF)
    with pytest.raises(UserError, match="byte-level BPE"):
        export_checkpoint(request, text_of(graph_of()))
    assert list(tmp_path.iterdir()) == []
