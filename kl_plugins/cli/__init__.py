"""The command line, one file a command: parse, call, print, exit code."""

from kl_plugins.cli.main import app, main

__all__ = ["app", "main"]
