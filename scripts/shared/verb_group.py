"""Command group whose verbs are imported when they run; its help is printed from a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click
import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True)
class Verb:
    """Table line of a verb.

    Args:
        target: ``module:attribute`` of a function, or of a ``typer.Typer`` with sub-commands.
        panel: heading of the verb in the help.
        summary: first sentence of the verb's own help.
    """

    target: str
    panel: str
    summary: str

    def load(self, name: str) -> click.Command:
        """Import the verb and return its command ``name``."""
        module, _, attribute = self.target.partition(":")
        found = getattr(import_module(module), attribute)
        shell = typer.Typer()
        if isinstance(found, typer.Typer):
            shell.add_typer(found, name=name)
        else:
            shell.command(name)(found)
        return typer.main.get_group(shell).commands[name]


class VerbGroup(TyperGroup):
    """Group of the verbs of a table, listed in its order."""

    def __init__(self, verbs: Mapping[str, Verb], **options: Any) -> None:
        stubs: dict[str, click.Command] = {
            name: TyperCommand(name, help=verb.summary, rich_help_panel=verb.panel)
            for name, verb in verbs.items()
        }
        super().__init__(commands=stubs, **options)
        self.verbs = verbs

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Import the verb that ``args`` name, in place of its table line."""
        name, stub, rest = super().resolve_command(ctx, args)
        return name, self.verbs[name].load(name) if name else stub, rest
