"""The ``fedgraft`` command: table of its verbs, and the exit codes and error lines of all of them."""

from __future__ import annotations

import json
import sys

import click

from configs.errors import Interrupted, UserError
from scripts.shared.console import option_names, warnings_as_lines
from scripts.shared.verb_group import Verb, VerbGroup

_GRAPH, _FEDERATION, _EXPERTS = "Expert graph", "Federated training", "Experts of any model"
_WEB = "Web page"
VERBS = {
    "bootstrap": Verb(
        "scripts.verbs.graph.bootstrap:bootstrap",
        _GRAPH,
        "Split the FFNs of a dense Llama into experts by balanced k-means, without training.",
    ),
    "heal": Verb(
        "scripts.verbs.graph.heal:heal",
        _GRAPH,
        "Train an expert graph by distillation from its dense base, and report the held-out perplexity.",
    ),
    "evaluate": Verb(
        "scripts.verbs.graph.evaluate:evaluate",
        _GRAPH,
        "Measure token-weighted perplexity on held-out text, per domain and over all of it.",
    ),
    "generate": Verb(
        "scripts.verbs.graph.generate:generate",
        _GRAPH,
        "Generate a continuation of a prompt; the text streams to stdout.",
    ),
    "export": Verb(
        "scripts.verbs.graph.export:export",
        _GRAPH,
        "Write an expert graph as a plain Llama, a mixture of experts of transformers, or a GGUF file for llama.cpp.",
    ),
    "push": Verb(
        "scripts.verbs.graph.push:push",
        _GRAPH,
        "Upload an export with its model card to a model hub, as one commit.",
    ),
    "simulate": Verb(
        "scripts.verbs.federation.simulate:simulate",
        _FEDERATION,
        "Train and rewire an expert graph with several clients, each with its own data.",
    ),
    "submit": Verb(
        "scripts.verbs.federation.submit:submit",
        _FEDERATION,
        "Train and rewire an expert graph on a SuperLink and its SuperNodes, as simulate does on this machine.",
    ),
    "resume": Verb(
        "scripts.verbs.federation.resume:resume",
        _FEDERATION,
        "Follow a submitted run again after its terminal was lost, or continue it after its last completed round.",
    ),
    "status": Verb(
        "scripts.verbs.federation.status:status",
        _FEDERATION,
        "Show state and progress of a submitted run, or the runs and SuperNodes of a SuperLink.",
    ),
    "stop": Verb(
        "scripts.verbs.federation.stop:stop",
        _FEDERATION,
        "End a submitted run: the server saves the model of the last completed round first.",
    ),
    "check-node": Verb(
        "scripts.verbs.federation.check_node:check_node",
        _FEDERATION,
        "Check whether data, graph, disk, memory and connection of a site fit a run, and measure what one round costs.",
    ),
    "saliency": Verb(
        "scripts.verbs.experts.saliency:saliency",
        _EXPERTS,
        "Measure the saliency of every expert of a model.",
    ),
    "experts": Verb(
        "scripts.verbs.experts.select:experts",
        _EXPERTS,
        "Choose the experts that stay in a model.",
    ),
    "prune": Verb(
        "scripts.verbs.experts.prune:prune",
        _EXPERTS,
        "Write a checkpoint without the experts that an expert list or the saliency removes.",
    ),
    "merge": Verb(
        "scripts.verbs.experts.merge:merge",
        _EXPERTS,
        "Merge each removed expert into the most similar one that stays, and write the smaller checkpoint.",
    ),
    "safety-scan": Verb(
        "scripts.verbs.experts.scan:safety_scan",
        _EXPERTS,
        "Flag the experts that are more active on harmful than on harmless prompts: the safety map of a selection.",
    ),
    "domain-scan": Verb(
        "scripts.verbs.experts.scan:domain_scan",
        _EXPERTS,
        "Flag the experts that are more active on a domain than on general text: the domain map of a selection.",
    ),
    "ui": Verb(
        "scripts.verbs.web.ui:ui",
        _WEB,
        "Serve the web page of the workbench on 127.0.0.1: experts, runs, differences, chat.",
    ),
}

app = VerbGroup(
    VERBS,
    name="fedgraft",
    help="Turn a pretrained Llama into a graph of experts, train it federated, look into it, ship it.",
    no_args_is_help=True,
)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns its exit code: 0, 2 for bad input, 130 for an interruption, 1 for any other failure.

    An error is one line on stderr and, with ``--json``, the object ``{"error"}`` on stdout.
    """
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
        return _fail(option_names(str(error)), arguments, code=2)
    except Interrupted as error:
        return _fail(str(error), arguments, code=130)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", arguments, code=130)
    except Exception as error:  # noqa: BLE001 - the boundary: a failure is one line, not a traceback
        return _fail(f"{type(error).__name__}: {error}", arguments, code=1)


def _fail(message: str, arguments: list[str], *, code: int) -> int:
    line = " ".join(message.split())
    print(f"fedgraft: error: {line}", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps({"error": line}))
    return code


if __name__ == "__main__":
    sys.exit(main())
