from __future__ import annotations

import pytest
from huggingface_hub import metadata_load

from configs.choices import ExportFormat
from models.export.card import CardFacts, card_metadata, card_text, write_card

REPORT = {
    "to": ExportFormat.MIXTRAL,
    "weights": "bf16",
    "perplexity": {"before": 12.34567, "after": 12.5},
    "mean_kl": 1.234e-4,
    "mean_logit_difference": 0.01,
    "argmax_agreement": 0.995,
    "tokens": 4096,
    "not_representable": ["default outputs: layers 0, 3"],
}


def test_a_card_names_base_licence_data_method_figures_and_use(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "LICENSE").write_text("terms")
    (source / "NOTICE.txt").write_text("notice")
    facts = CardFacts("me/base", "apache-2.0", ["stories"], ["wikimix", str(source)])
    write_card(out, source, facts, REPORT, name="tiny")
    metadata = metadata_load(out / "README.md")
    assert metadata == {
        "base_model": "me/base",
        "license": "apache-2.0",
        "datasets": ["stories"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fedgraft", "mixture-of-experts"],
    }
    text = (out / "README.md").read_text()
    for words in (
        "# tiny",
        "- Base: me/base",
        "- Licence: apache-2.0",
        "- Training data: stories",
        "wikimix, source; 4096 tokens",
        "| perplexity before | 12.3457 |",
        "| mean KL divergence, nats per token | 1.23e-04 |",
        "- default outputs: layers 0, 3",
        "AutoModelForCausalLM.from_pretrained",
    ):
        assert words in text
    assert str(tmp_path) not in text
    assert ((out / "LICENSE").read_text(), (out / "NOTICE.txt").read_text()) == ("terms", "notice")


def test_base_and_licence_of_the_source_are_carried(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n# old\n")
    write_card(out, source, CardFacts(), REPORT, name="x")
    assert card_metadata(out)["license"] == "mit" and card_metadata(out)["base_model"] == "a/b"
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    assert card_metadata(source) == {} and card_metadata(tmp_path) == {}


@pytest.mark.parametrize("to", ExportFormat)
def test_every_format_has_a_method(to):
    text = card_text("x", None, None, CardFacts(), REPORT | {"to": to, "file": "somewhere/model-fp16.gguf"})
    assert "For this export" in text and "- Base: not named" in text
    assert ("llama-cli -m model-fp16.gguf" in text) == (to == ExportFormat.GGUF)
