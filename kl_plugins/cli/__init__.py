"""The command line, one file a command: parse, call, print, exit code. `commands` puts them together."""

from kl_plugins.cli.commands import app, main

__all__ = ["app", "main"]
