"""Quick start: bootstrap, federated training, export and samples on the embedded model, one stage at a time.

Each stage is a ``fedgraft`` command whose result is stored; a second run repeats only stages without a result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from configs.output import write_json
from configs.paths import default_graph
from scripts.shared.console import stderr
from scripts.shared.run_summary import summary_lines
from scripts.verbs.federation.simulate import PROJECT

DEMO = Path("models/demo")
CONFIG = Path("configs/quickstart.toml")
EXPERTS = 16
PROMPT = "# "


class QuickStart:
    """Stages of the quick start and the folders of their results.

    Args:
        folder: folder of logs, models and results.
        graph: folder of the bootstrapped graph.
    """

    def __init__(self, folder: Path, graph: Path) -> None:
        self.folder, self.graph = folder, graph
        self.inputs = _digest([DEMO / "model.safetensors", CONFIG])

    def stage(self, name: str, arguments: list[str], *, output: Path | None = None) -> dict[str, Any]:
        """Run ``fedgraft ARGUMENTS --json`` unless its result from the same inputs is there; returns the result.

        Raises:
            SystemExit: the command failed; its error is on stderr.
        """
        kept = self.folder / f"{name}.json"
        if (result := self._read(kept, arguments)) is not None and (output is None or output.exists()):
            stderr.print(f"[green]kept[/green]  {name}")
            return result
        stderr.print(f"[bold]$ fedgraft {shlex.join(arguments)}[/bold]", highlight=False)
        command = [sys.executable, "fedgraft.py", *arguments, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.returncode)
        result = json.loads(done.stdout)
        write_json(kept, {"inputs": self.inputs, "arguments": arguments, "result": result})
        return result

    def _read(self, kept: Path, arguments: list[str]) -> dict[str, Any] | None:
        if not kept.is_file():
            return None
        found = json.loads(kept.read_text())
        return found["result"] if (found["inputs"], found["arguments"]) == (self.inputs, arguments) else None


def run(quick: QuickStart) -> dict[str, Any]:
    """Run all stages in order; returns their results by name."""
    graph, run_logs = str(quick.graph), str(quick.folder / "run")
    trained, dense = str(quick.folder / "model"), str(quick.folder / "dense")
    results = {
        "bootstrap": quick.stage(
            "bootstrap",
            ["bootstrap", "--model", str(DEMO), "--experts", str(EXPERTS), "--out", graph, "--overwrite"],
            output=quick.graph,
        ),
        "simulate": quick.stage(
            "simulate",
            ["simulate", "--graph", graph, "--config", str(CONFIG)]
            + ["--log-dir", run_logs, "--out", trained, "--overwrite"],
            output=quick.folder / "model",
        ),
        "export": quick.stage(
            "export",
            ["export", "--model", trained, "--out", dense, "--overwrite"],
            output=quick.folder / "dense",
        ),
    }
    for name, model in (("before", graph), ("after", trained)):
        results[name] = quick.stage(
            f"sample_{name}", ["generate", "--model", model, "--prompt", PROMPT, "--max-new-tokens", "80"]
        )
    return results


def lines(results: dict[str, Any], quick: QuickStart) -> list[Any]:
    """Lines of the summary, for ``rich``."""
    half = results["bootstrap"]["perplexity"]["50"]
    emergent = (
        f"half of the {EXPERTS} experts active, before training: k-means experts {half['router']:.2f}, "
        f"random experts {half['random']:.2f} (dense: {results['bootstrap']['perplexity']['dense']:.2f})"
    )
    samples = [
        f"[bold]sample {name}:[/bold] {results[name]['prompt']}{_plain(results[name]['text'])}"
        for name in ("before", "after")
    ]
    exported = results["export"]
    lost = "; ".join(exported["not_representable"]) or "nothing is lost"
    paths = [
        f"dense export: {exported['out']} (largest logit difference {exported['max_logit_difference']:.2e}; {lost})",
        f"graph before training: {quick.graph}",
        f"curves: .venv/bin/tensorboard --logdir {quick.folder / 'run' / 'tensorboard'}",
        "tests: bash scripts/test.sh",
    ]
    return [*samples, "", f"perplexity with {emergent}", *summary_lines(results["simulate"]), *paths]


def main() -> None:
    """Run the quick start and print its summary."""
    parser = argparse.ArgumentParser(description="Run the whole job once on the embedded model.")
    parser.add_argument("--fresh", action="store_true", help="repeat the stages that have results")
    arguments = parser.parse_args()
    folder = PROJECT / "logs" / "quickstart"
    if arguments.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    quick = QuickStart(folder.relative_to(PROJECT), default_graph())
    from rich.console import Console

    console = Console()
    for line in lines(run(quick), quick):
        console.print(line, highlight=False)


def _digest(paths: list[Path]) -> str:
    return hashlib.sha256(b"".join((PROJECT / path).read_bytes() for path in paths)).hexdigest()


def _plain(text: str) -> str:
    """Escape rich's markup in a text."""
    from rich.markup import escape

    return escape(text.strip())


if __name__ == "__main__":
    main()
