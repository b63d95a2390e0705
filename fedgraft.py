"""The ``fedgraft`` command: one verb per task, each in ``scripts/``."""

from __future__ import annotations

import json
import sys

import click
import typer

from configs.errors import UserError
from scripts.shared.console import warnings_as_lines
from scripts.verbs.experts.merge import merge
from scripts.verbs.experts.prune import prune
from scripts.verbs.experts.saliency import saliency
from scripts.verbs.experts.scan import domain_scan, safety_scan
from scripts.verbs.experts.select import experts
from scripts.verbs.federation.simulate import simulate
from scripts.verbs.graph.bootstrap import bootstrap
from scripts.verbs.graph.evaluate import evaluate
from scripts.verbs.graph.export import export
from scripts.verbs.graph.generate import generate

VERBS = (bootstrap, simulate, evaluate, generate, export, prune, merge, safety_scan, domain_scan)

app = typer.Typer(
    name="fedgraft",
    help="Turn a pretrained Llama into a graph of experts, train it federated, look into it, ship it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in VERBS:
    app.command(verb.__name__.replace("_", "-"))(verb)
app.add_typer(saliency, name="saliency")
app.add_typer(experts, name="experts")


def main(arguments: list[str] | None = None) -> int:
    """Run one verb. Returns 0, 2 for bad input (one line says what to mend), or 1 for a failure."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with warnings_as_lines():
            return app(args=arguments, standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as help_text:
        click.echo(help_text.format_message())
        return 0
    except click.ClickException as error:
        return _fail(error.format_message(), arguments, code=2)
    except UserError as error:
        return _fail(str(error), arguments, code=2)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", arguments, code=130)
    except (
        Exception
    ) as error:  # noqa: BLE001 - the boundary: a failure leaves as one line, not as a traceback
        return _fail(f"{type(error).__name__}: {error}", arguments, code=1)


def _fail(message: str, arguments: list[str], *, code: int) -> int:
    line = " ".join(message.split())
    print(f"fedgraft: error: {line}", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps({"error": line}))
    return code


if __name__ == "__main__":
    sys.exit(main())
