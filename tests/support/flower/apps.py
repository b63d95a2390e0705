"""A Flower app of a few lines, for tests of what drives Flower."""

from __future__ import annotations

from pathlib import Path

# Environment of a machine whose proxy does not answer: loopback must not go through it.
UNREACHABLE_PROXY = dict.fromkeys(
    ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"), "http://127.0.0.1:9"
)

PYPROJECT = """
[project]
name = "throwaway"
version = "0.1.0"
description = "Writes down which nodes answered."
license = "Apache-2.0"
dependencies = ["flwr"]

[tool.flwr.app]
publisher = "test"

[tool.flwr.app.components]
serverapp = "throwaway:server"
clientapp = "throwaway:client"

[tool.flwr.app.config]
graph = ""
num-rounds = 1
log-dir = ""
out = ""
data = ""
fail = ""
"""

APP = """
import json
import os
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp


class UserError(ValueError):
    pass


server = ServerApp()
client = ClientApp()


@client.train()
def train(message, context):
    node = {key: context.node_config.get(key, "") for key in ("partition-id", "num-partitions", "data-dir")}
    return Message(RecordDict({"node": ConfigRecord(node)}), reply_to=message)


@server.main()
def main(grid, context):
    config = context.run_config
    if config["fail"]:
        raise {"user": UserError, "other": RuntimeError}[config["graph"]](config["fail"])
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.1)
    for _ in range(config["num-rounds"]):
        messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
        nodes = [dict(reply.content["node"]) for reply in grid.send_and_receive(messages)]
    seen = {"nodes": nodes, "config": dict(config), "cwd": os.listdir(), "home": os.environ["FLWR_HOME"]}
    Path(config["out"]).write_text(json.dumps(seen))
    print("the server app is done")
"""


def write_throwaway_app(folder: Path) -> Path:
    """Write the app into ``folder``, which Flower demands to be named with letters, digits and hyphens."""
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "throwaway.py").write_text(APP)
    return folder
