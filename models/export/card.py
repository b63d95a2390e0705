"""Model card of an export: base, data, method, figures, how to load it; its licence."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from configs.choices import ExportFormat
from configs.output import write_bytes

CARD_NAME = "README.md"
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
_SCALED = (
    "router rows are scaled by a power of two, so that the softmax weights {all} experts alike, and down projections "
    "are multiplied by the number of {all} experts; shared experts, if any, {shared}"
)
_METHODS = {
    ExportFormat.DENSE: "the experts of each layer are concatenated to one dense FFN, which runs all of them",
    ExportFormat.MIXTRAL: _SCALED.format(all="chosen", shared="are copied into every expert"),
    ExportFormat.QWEN2_MOE: _SCALED.format(
        all="routed", shared="form the shared expert, whose gate is one half for every token"
    ),
    ExportFormat.GRANITE_MOE: _SCALED.format(all="chosen", shared="form the shared MLP"),
    ExportFormat.GGUF: "the model is written as a GGUF file for llama.cpp",
}
_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this repository
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```"""
_LLAMA_CPP = """```bash
llama-cli -m {file} -p "Once upon a time" -n 40
```"""


@dataclass(frozen=True)
class CardFacts:
    """Facts of a model card that the checkpoint does not hold.

    Attributes:
        base_model: name of the dense base; empty: that of the source's card, if any.
        license: identifier of the licence; empty: that of the source's card, if any.
        trained_on: names of training data.
        measured_on: data sources of the comparison.
    """

    base_model: str = ""
    license: str = ""
    trained_on: Sequence[str] = ()
    measured_on: Sequence[str] = ()


def write_card(
    directory: Path, source: Path, facts: CardFacts, report: Mapping[str, Any], *, name: str
) -> None:
    """Write the model card of an export, and copy the licence files of its source.

    Args:
        directory: of the export.
        source: directory of the model that was exported.
        facts: names of base, licence and data.
        report: values that ``export_checkpoint`` returns.
        name: title of the card.
    """
    for pattern in _LICENCES:
        for path in source.glob(pattern):
            shutil.copyfile(path, directory / path.name)
    known = card_metadata(source)
    base, licence = facts.base_model or known.get("base_model"), facts.license or known.get("license")
    values = {"base_model": base, "license": licence, "datasets": list(facts.trained_on) or None}
    data = ModelCardData(
        **{key: value for key, value in values.items() if value},
        library_name="gguf" if report["to"] == ExportFormat.GGUF else "transformers",
        pipeline_tag="text-generation",
        tags=["fedgraft", *([] if report["to"] == ExportFormat.DENSE else ["mixture-of-experts"])],
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{card_text(name, base, licence, facts, report)}"
    write_bytes(directory / CARD_NAME, text.encode())


def card_metadata(source: Path) -> dict[str, Any]:
    """Metadata of the model card in a folder; empty without one or with one that cannot be read."""
    path = source / CARD_NAME
    try:
        return (metadata_load(path) or {}) if path.is_file() else {}
    except (ValueError, YAMLError):
        return {}


def card_text(name: str, base: Any, licence: Any, facts: CardFacts, report: Mapping[str, Any]) -> str:
    """Text of a model card, in Markdown.

    Args:
        name: title.
        base: name of the dense base, or None.
        licence: identifier of the licence, or None.
        facts: names of the data.
        report: values that ``export_checkpoint`` returns.
    """
    lost = [f"- {what}" for what in report["not_representable"]]
    gguf = report["to"] == ExportFormat.GGUF
    load = _LLAMA_CPP.format(file=Path(report.get("file", "")).name) if gguf else _TRANSFORMERS
    return "\n".join(
        [
            f"# {name}",
            "",
            f"Export of an expert graph of FedGraft to {report['to']}, weights in {report['weights']}.",
            "",
            f"- Base: {base or 'not named'}",
            f"- Licence: {licence or 'not named'}; that of the base applies",
            f"- Training data: {', '.join(facts.trained_on) or 'not named'}",
            "",
            "## Method",
            "",
            f"An expert graph splits the FFNs of a dense Llama into experts. For this export {_METHODS[report['to']]}.",
            "",
            "## Deviation from the graph",
            "",
            f"Held-out text: {', '.join(_names(facts.measured_on)) or 'not named'}; {report['tokens']} tokens.",
            "",
            *_figures(report),
            "",
            *(["Not representable in this format:", "", *lost, ""] if lost else []),
            "## Use",
            "",
            load,
            "",
        ]
    )


def _figures(report: Mapping[str, Any]) -> list[str]:
    perplexity = report["perplexity"]
    rows = {
        "perplexity before": f"{perplexity['before']:.4f}",
        "perplexity after": f"{perplexity['after']:.4f}",
        "mean KL divergence, nats per token": f"{report['mean_kl']:.2e}",
        "mean logit difference": f"{report['mean_logit_difference']:.2e}",
        "tokens with the same most likely next token": f"{report['argmax_agreement']:.2%}",
    }
    return ["| quantity | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _names(sources: Sequence[str]) -> list[str]:
    """Data sources without the folders that they are in."""
    return [Path(source).name if Path(source).exists() else source for source in sources]
