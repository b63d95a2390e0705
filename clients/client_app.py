"""Flower ClientApp. Each message may start a new process, so that all state is on the client's disk."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from clients.message_start import message_start
from clients.participant import Participant
from clients.state.local_copy import VersionMismatch
from clients.state.local_graph import NeedsRecipe
from configs.errors import UserError
from configs.schema import load_run_config
from federated.protocol.messages import (
    BAD_INPUT,
    NEEDS_RECIPE,
    REFUSED,
    RESEND,
    Reply,
    Request,
    read_request,
    write_reply,
)
from federated.run_setup import prepare_process

_log = logging.getLogger(__name__)

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the client's own data and reply with a sparse update."""
    return _answer(message, context, Participant.train_round)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on the client's held-out text."""
    return _answer(message, context, Participant.evaluate_round)


def _answer(message: Message, context: Context, act: Callable[[Participant, Request], Reply]) -> Message:
    """Run ``act`` and reply; every exception becomes an error reply, since without a reply the SuperNode blocks."""
    started = message_start()
    try:
        config = load_run_config(context.run_config)
        prepare_process(config)
        request = read_request(message.content)
        reply = act(Participant.open(config, context, request, started=started), request)
        return Message(write_reply(reply), reply_to=message)
    except VersionMismatch as error:
        return Message(Error(code=RESEND, reason=str(error.version)), reply_to=message)
    except NeedsRecipe as error:
        return Message(Error(code=NEEDS_RECIPE, reason=str(error)), reply_to=message)
    except UserError as error:
        return Message(Error(code=BAD_INPUT, reason=" ".join(str(error).split())), reply_to=message)
    except Exception as error:  # noqa: BLE001 - the boundary to Flower
        _log.exception("failure while handling a message")
        return Message(Error(code=REFUSED, reason=_reason(error)), reply_to=message)


def _reason(error: Exception) -> str:
    """One line about an unexpected exception."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        space = "expected free disk space for the client's files"
        return f"{space}, got {error}; free some, or set cache-dir to a larger disk"
    return " ".join(f"{type(error).__name__}: {error}".split())
