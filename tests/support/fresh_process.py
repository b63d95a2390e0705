"""The ClientApp as it is deployed: every message is answered by a process that has just started."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from flwr.app import Context, Message
from flwr.supercore.task_identity import TaskIdentity

from clients.client_app import app


class FreshProcessApp:
    """Stands in for the ClientApp; nothing that a message leaves in memory reaches the next."""

    def __init__(self) -> None:
        self._processes = multiprocessing.get_context("forkserver")
        # The server of the forks imports the app and runs nothing, so every fork is as good as new.
        self._processes.set_forkserver_preload(["tests.support.fresh_process"])

    def __call__(self, message: Message, context: Context) -> Message:
        with ProcessPoolExecutor(1, mp_context=self._processes) as pool:
            return pool.submit(_answer, message, context).result()


def _answer(message: Message, context: Context) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, context.run_id, context.node_id
    return app(message, context)
