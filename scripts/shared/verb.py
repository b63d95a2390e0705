"""Verbs from option dataclasses: a decorator that expands them into the options of the command line.

A dataclass is the only place of an option's names, help and default::

    @dataclass(frozen=True)
    class TextOptions:
        batch_size: Annotated[int, typer.Option(min=1, help="Blocks per forward pass.")] = 8

    @verb
    def collect(model: ExpertModel, text: TextOptions = TextOptions()) -> None: ...

The default of the parameter gives the defaults of its options: a verb with others passes
``TextOptions(batch_size=1)``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import click
import typer
from click.core import ParameterSource

from configs.errors import UserError, nearest
from configs.values import read_config_file

_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Expand the option dataclasses in a function's signature into typer options; add ``--config``.

    The function is called with the dataclasses built from the parsed options. A function with a parameter ``config`` of
    its own keeps that.
    """
    hints = get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = [each for own in signature.parameters.values() for each in _expanded(own, hints[own.name])]
    if not (own_config := "config" in signature.parameters):
        parameters.append(inspect.Parameter("config", _KEYWORD, default=None, annotation=ConfigFile))

    @functools.wraps(function)
    def run(**values: Any) -> None:
        if not own_config:
            values.pop("config", None)
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        function(**values)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": None}
    return run


def given_options() -> set[str]:
    """Names of the parameters that the command line or the configuration file sets, even to their default."""
    context = click.get_current_context(silent=True)
    if context is None:
        return set()
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source not in (None, ParameterSource.DEFAULT)}


def _expanded(parameter: inspect.Parameter, hint: Any) -> Iterator[inspect.Parameter]:
    """The parameter itself, or one for each field of the option dataclass that it is annotated with."""
    if not is_dataclass(hint):
        yield parameter.replace(annotation=hint, kind=_KEYWORD)
        return
    hints = get_type_hints(hint, include_extras=True)
    for field in fields(hint):
        default = _default(field, parameter.default)
        yield inspect.Parameter(field.name, _KEYWORD, default=default, annotation=hints[field.name])


def _default(field: Field, given: Any) -> Any:
    if given is not inspect.Parameter.empty:
        return getattr(given, field.name)
    return inspect.Parameter.empty if field.default is MISSING else field.default


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a TOML file as defaults of the command's options.

    Raises:
        UserError: no such file, a syntax error, or a key that is no option of the command.
    """
    if path is None:
        return None
    options = {
        name.lstrip("-"): parameter
        for parameter in context.command.params
        if isinstance(parameter, click.Option) and parameter.name not in ("config", "help")
        for name in parameter.opts
    }
    values: dict[str, Any] = {}
    for key, value in read_config_file(path).items():
        if key not in options:
            raise UserError(
                f"expected options of {context.command.name} in {path}, got {key!r}{nearest(key, options)}"
            )
        repeated = options[key].multiple and not isinstance(value, list)
        values[str(options[key].name)] = [value] if repeated else value
    context.default_map = {**(context.default_map or {}), **values}
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_read_config,
        help="TOML file of options (hyphenated names); the command line overrides it.",
    ),
]
