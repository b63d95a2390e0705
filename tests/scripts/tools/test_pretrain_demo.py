"""The pre-training script on a tiny configuration, and the embedded checkpoint that it made."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from configs.errors import UserError
from federated.data import wikimix
from scripts.tools import pretrain_demo
from tests.support.paths import ROOT

DEMO = ROOT / "models" / "demo"
QUIET = Console(quiet=True)
UNICODE = [
    "plain words\n\n  indented\ttab",
    "Grüße, żółć, Ελλάδα, 日本語, العربية",
    "🦊🚲 e\u0301\u200b",
    "\x00\x7f\ufffd",
    "<b>&amp;</b>",
]


def perplexity(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """exp of the mean loss over blocks ``[N, context]``, as transformers computes it."""
    with torch.no_grad():
        return math.exp(model(input_ids=rows, labels=rows, use_cache=False).loss.item())


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """The same code on less text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_demo, "TOKENIZER_DOCUMENTS", 20)
        patch.setattr(pretrain_demo, "VALID_BLOCKS", 8)
        yield


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return pretrain_demo.train_tokenizer(320, 64)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = json.loads(pretrain_demo.CONFIG.read_text(encoding="utf-8"))
    config |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 320, "max_position_embeddings": 64}
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny_run(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """A run through the command line: the folder and the summary it printed."""
    out = tmp_path_factory.mktemp("run") / "tiny"
    arguments = ["--out", str(out), "--config", str(config_file), "--json", "--minutes", "0.05"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert pretrain_demo.main(arguments) == 0
    return out, json.loads(printed.getvalue())


def test_script_runs_from_any_folder(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts" / "tools" / "pretrain_demo.py"),
        "--out",
        "new",
        "--minutes",
        "0",
        "--json",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "--minutes" in json.loads(done.stdout)["error"]
    assert not list(tmp_path.iterdir())


def test_tokenizer_knows_every_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, None)
    for text in [*UNICODE, *wikimix.documents("python", 3), *wikimix.documents("recipes", 3)]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_blocks_put_a_bos_before_each_document(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = pretrain_demo.blocks(tokenizer, "json", 5, 64, seed=4)
    assert rows.shape == (5, 64) and rows.dtype == torch.int64 and rows[0, 0] == tokenizer.bos_token_id
    texts = tokenizer.decode(rows.flatten()).split("<s>")[1:]
    expected = wikimix.documents("json", len(texts), seed=4)
    assert texts[:-1] == expected[:-1] and expected[-1].startswith(texts[-1])
    assert not torch.equal(rows, pretrain_demo.blocks(tokenizer, "json", 5, 64, seed=4, split="valid"))


def test_perplexity_of_a_uniform_model_is_the_vocabulary(
    config_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = LlamaForCausalLM(pretrain_demo.load_config(config_file))
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path)
    measured = pretrain_demo.held_out_perplexity(tmp_path, tokenizer, 64)
    assert measured == pytest.approx(dict.fromkeys(wikimix.DOMAINS, 320), rel=1e-4)


def test_run_saves_what_transformers_loads(tiny_run: tuple[Path, dict[str, object]]) -> None:
    out, summary = tiny_run
    assert json.loads((out / "training.json").read_text(encoding="utf-8")) == summary
    assert summary["steps"] == round(0.05 * pretrain_demo.STEPS_PER_MINUTE)
    assert set(summary["perplexity"]) == set(wikimix.DOMAINS)  # type: ignore[call-overload]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and model.num_parameters() == summary["parameters"]
    rows = pretrain_demo.blocks(tokenizer, "prose", pretrain_demo.VALID_BLOCKS, 64, split="valid")
    measured = perplexity(model.float(), rows)
    assert measured == pytest.approx(summary["perplexity"]["prose"], rel=1e-3)  # type: ignore[index]
    assert not list(out.parent.glob("*.partial")) and not list(out.parent.glob(".*"))


def test_training_lowers_the_perplexity_and_is_repeatable(config_file: Path, tmp_path: Path) -> None:
    config = pretrain_demo.load_config(config_file)
    runs = [
        pretrain_demo.pretrain(config, steps=steps, seed=0, out=tmp_path / str(index), console=QUIET)[
            "perplexity"
        ]
        for index, steps in enumerate((1, 40, 40))
    ]
    assert all(runs[1][name] < 0.8 * runs[0][name] for name in pretrain_demo.pretraining_domains())
    assert runs[1] == pytest.approx(runs[2], rel=0.02)


def test_bad_input_is_one_line_and_leaves_nothing(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep", encoding="utf-8")
    assert pretrain_demo.main(["--out", str(full)]) == 2
    assert (
        "--overwrite" in capsys.readouterr().err and (full / "mine.txt").read_text(encoding="utf-8") == "keep"
    )
    assert pretrain_demo.main(["--out", str(full / "mine.txt"), "--json"]) == 2
    assert "directory" in json.loads(capsys.readouterr().out)["error"]
    assert pretrain_demo.main(["--out", str(tmp_path / "new"), "--minutes", "0", "--json"]) == 2
    assert "--minutes" in json.loads(capsys.readouterr().out)["error"]

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain_demo, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pretrain_demo.main(
            ["--out", str(tmp_path / "new"), "--config", str(config_file), "--minutes", "0.02"]
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("content", ["{", '["hidden_size"]', None])
def test_bad_configuration_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="expected a Llama configuration"):
        pretrain_demo.load_config(path)


def test_minutes_choose_the_steps() -> None:
    assert pretrain_demo.steps_for(25) == 25 * pretrain_demo.STEPS_PER_MINUTE
    assert pretrain_demo.steps_for(0.01) == 1
    for minutes in (0, -1, math.nan, math.inf):
        with pytest.raises(UserError, match="--minutes"):
            pretrain_demo.steps_for(minutes)


def test_embedded_checkpoint_is_small_and_divisible() -> None:
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    assert config["intermediate_size"] % 16 == 0 and config["model_type"] == "llama"
    assert (DEMO / "model.safetensors").stat().st_size <= 8_000_000
    for name in (
        "README.md",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    ):
        text = (DEMO / name).read_text(encoding="utf-8")
        assert "/home" not in text and "/work" not in text and "/tmp" not in text and "/root" not in text
    wanted = json.loads(pretrain_demo.CONFIG.read_text(encoding="utf-8"))
    assert all(config[key] == value for key, value in wanted.items() if key != "rope_theta")
    assert config["rope_parameters"]["rope_theta"] == wanted["rope_theta"]


def test_embedded_checkpoint_keeps_its_word() -> None:
    training = json.loads((DEMO / "training.json").read_text(encoding="utf-8"))
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    assert training["held_out"] == list(wikimix.HELD_OUT) and set(training["perplexity"]) == set(
        wikimix.DOMAINS
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(
        DEMO, dtype=torch.float32
    ), AutoTokenizer.from_pretrained(DEMO)
    assert 2_000_000 <= model.num_parameters() == training["parameters"] <= 4_000_000
    assert (tokenizer.bos_token, tokenizer.bos_token_id, tokenizer.eos_token_id) == ("<s>", 0, 1)
    assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in UNICODE] == UNICODE
    for name, stated in training["perplexity"].items():
        rows = pretrain_demo.blocks(tokenizer, name, 8, 256, split="valid")
        assert math.log(perplexity(model, rows)) == pytest.approx(math.log(stated), abs=0.25)
        assert f"| {name} | {stated:.2f} |" in card
