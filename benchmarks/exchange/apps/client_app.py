"""ClientApp that sends back what it received; it imports Flower alone."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Reply with the content of the message."""
    return Message(message.content, reply_to=message)
