"""`kl-plugins`, called in the process of a test."""

from __future__ import annotations

from typer.testing import CliRunner

from kl_plugins.cli import app


def invoke(*words, code=0):
    """What `kl-plugins WORDS` prints; asserts the exit code."""
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output
