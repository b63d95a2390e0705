"""Chat tab: layout and callbacks over the functions of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from configs.errors import UserError
from ui.chat.colored_text import answer_html
from ui.chat.generation import Answer, Opened, check_form, open_model, stream_answer
from ui.shared.callbacks import callback
from ui.shared.html import note
from ui.shared.sessions import Session
from ui.shared.tab import MODEL_EVENT, Tab

_OPENED = "opened models"


class ChatTab(Tab):
    """Callbacks of the Chat tab."""

    def chat(
        self,
        request: gr.Request,
        base: str | None,
        result: str | None,
        prompt: str,
        max_new_tokens: float,
        temperature: float,
        layer: float,
    ) -> Iterator[tuple[str, str]]:
        """Continue a prompt with the base model, then with the result; both stream."""
        check_form(prompt, max_new_tokens, temperature)
        session = self.sessions.get(request.session_hash)
        folders = [self.workspace.known_model(name) if name else None for name in (base, result)]
        if not any(folders):
            raise UserError("expected a `model` at least, got none; choose one")
        session.values["stop chat"] = False
        shown = [note("no model chosen") if folder is None else note("waiting") for folder in folders]
        for side, folder in enumerate(folders):
            if folder is None:
                continue
            shown[side] = note(f"opening {folder}")
            yield shown[0], shown[1]
            opened = _opened(session, folder, [each for each in folders if each])
            number, heat = int(max_new_tokens), float(temperature)
            answer = Answer()
            stream = stream_answer(
                opened, prompt, max_new_tokens=number, temperature=heat, layer=int(layer or 0)
            )
            for answer in stream:
                shown[side] = answer_html(folder.name, answer)
                yield shown[0], shown[1]
                if session.values["stop chat"]:
                    return
            shown[side] = answer_html(folder.name, answer)
        yield shown[0], shown[1]

    def stop(self, request: gr.Request) -> None:
        """End the generation of the session after its next token."""
        self.sessions.get(request.session_hash).values["stop chat"] = True

    def build(self) -> list[gr.Dropdown]:
        """Lay out the tab and connect its callbacks; returns the dropdowns of models."""
        with gr.Row():
            models = [
                gr.Dropdown(label=label, choices=self.workspace.models()) for label in ("Base", "Result")
            ]
        prompt = gr.Textbox(label="Prompt", lines=3, value="The ")
        with gr.Row():
            number = gr.Number(
                label="New tokens", value=64, minimum=1, maximum=4096, precision=0, min_width=110
            )
            heat = gr.Slider(0, 2, value=0, step=0.1, label="Temperature", min_width=160)
            layer = gr.Number(label="Layer of the colors", value=0, minimum=0, precision=0, min_width=110)
        with gr.Row():
            send, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
        with gr.Row():
            answers = [
                gr.HTML(label=label, min_height=120) for label in ("Text of the base", "Text of the result")
            ]
        send.click(
            callback(self.chat),
            [*models, prompt, number, heat, layer],
            answers,
            api_name="chat",
            **MODEL_EVENT,
        )
        stop.click(callback(self.stop), None, None, api_name="stop_chat", show_progress="hidden")
        return models


def _opened(session: Session, folder: Path, wanted: list[Path]) -> Opened:
    """The opened model of a folder; those that are not wanted are closed first."""
    opened: dict[Path, Opened] = session.values.setdefault(_OPENED, {})
    for other in set(opened) - set(wanted):
        del opened[other]
    if folder not in opened:
        opened[folder] = open_model(folder)
    return opened[folder]
