from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Message, RecordDict

from benchmarks.drift.switched_app import SwitchedApp
from server.flower.in_process_grid import RUN_ID
from tests.support.tiny_federation import node_configs


def deliver(app: SwitchedApp, context: Context, server_round: int) -> str:
    message: Any = SimpleNamespace(metadata=SimpleNamespace(group_id=str(server_round)))
    app(message, context)
    return str(context.node_config["data-dir"])


def test_the_text_of_chosen_clients_changes_once_after_the_round(tmp_path):
    seen: list[int] = []

    def answer(message: Message, context: Context) -> Message:
        seen.append(int(context.node_config["partition-id"]))
        return message

    app = SwitchedApp(answer, 2, {0: Path("new")})
    contexts, blocks = [], []
    for node in node_configs(2):
        blocks.append(
            tmp_path / "clients" / f"run-{RUN_ID}" / f"client-{node['partition-id']}" / "blocks.safetensors"
        )
        blocks[-1].parent.mkdir(parents=True)
        blocks[-1].touch()
        contexts.append(
            Context(RUN_ID, 5, node | {"data-dir": "old"}, RecordDict(), {"log-dir": str(tmp_path)})
        )
    assert [deliver(app, each, 2) for each in contexts] == ["old", "old"]
    assert [path.exists() for path in blocks] == [True, True]
    assert [deliver(app, each, 3) for each in contexts] == ["new", "old"]
    assert [path.exists() for path in blocks] == [False, True]
    blocks[0].touch()
    assert deliver(app, contexts[0], 4) == "new" and blocks[0].exists()
    assert seen == [0, 1, 0, 1, 0]
