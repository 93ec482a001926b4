"""The fields of an options dataclass as flags of a command line: in a command, or in the words of a variable."""

from __future__ import annotations

import inspect
import shlex
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from kl_plugins.errors import ConfigError

# What a wrong word raises: click's class, or that of the copy of click which newer versions of typer bring.
UsageError: Any = typer.BadParameter.__base__


def with_flags(function: Any, options: type, **more: tuple[Any, Any]) -> Any:
    """Give `function(context, **values)` a flag for each field of the dataclass `options`, for typer to read.

    `more` are other flags: name -> (annotation of typer, default). Returns `function`, changed in place.
    """
    hints = get_type_hints(options) | {"kl_weight_clip": tuple[float, float]}
    declared = {}
    for f in fields(options):
        default = tuple(f.default_factory()) if callable(f.default_factory) else f.default
        flag = f"--{f.name.replace('_', '-')}"
        declared[f.name] = (Annotated[hints[f.name], typer.Option(flag, help=f.metadata["help"])], default)
    declared |= more
    keyword = inspect.Parameter.KEYWORD_ONLY
    function.__signature__ = inspect.Signature(
        [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
        + [inspect.Parameter(name, keyword, default=d, annotation=a) for name, (a, d) in declared.items()]
    )
    function.__annotations__ = {"context": typer.Context} | {name: a for name, (a, _) in declared.items()}
    return function


def parse_flags(words: str, options: type, *, of: str) -> Any:
    """An `options` from its flags in one string, which came from `of`: `"--kl k2_as_loss --kl-off-policy token"`.

    Raises `ConfigError` for a flag that `options` doesn't have, a value that is none of it, and anything else.
    """

    def nothing(context: typer.Context, **values: Any) -> None:
        pass

    app = typer.Typer(add_completion=False)
    app.command(add_help_option=False)(with_flags(nothing, options))
    try:
        values = typer.main.get_command(app).make_context(of, shlex.split(words)).params
    except UsageError as error:
        foreign = type(error) is UsageError or type(error).__name__ == "NoSuchOption"  # words, flags of something else
        hint = "; only options of the KL belong here" if foreign else ""
        raise ConfigError(f"{of}={words!r}: {error.format_message().rstrip('.')}{hint}") from error
    except ValueError as error:  # an open quotation mark
        raise ConfigError(f"{of}={words!r}: {error}") from error
    return options(**values)
