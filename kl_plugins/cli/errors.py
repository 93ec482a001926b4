"""How a command ends when the user has something to mend: the error in red, and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from kl_plugins.cli.layout import paragraph, unwrapped
from kl_plugins.errors import ConfigError, PatchError, UnknownLossError


@contextmanager
def user_errors(*others: type[Exception]) -> Iterator[None]:
    """Print what the package refuses to stderr and end with exit code 2; any other exception passes.

    Args:
        others: Exceptions besides `ConfigError`, `PatchError` and `UnknownLossError` that are to be shown like them.
    """
    shown: tuple[type[Exception], ...] = (ConfigError, PatchError, UnknownLossError, *others)
    try:
        yield
    except shown as error:
        console = Console(stderr=True)
        if console.is_terminal:
            paragraph(console, str(error), label="error:", label_style="red")
        else:  # one line in a log, whose messages are searched for
            unwrapped(console, f"error: {error}")
        raise typer.Exit(2) from error
