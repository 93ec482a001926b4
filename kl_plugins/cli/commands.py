"""`kl-plugins`: the app, which is all commands together."""

from __future__ import annotations

from typing import Annotated

import typer

from kl_plugins._version import __version__
from kl_plugins.cli.audit import audit
from kl_plugins.cli.curves import curves
from kl_plugins.cli.doctor import doctor
from kl_plugins.cli.explain import explain
from kl_plugins.cli.openrlhf import FLAGS_AFTER_OURS, openrlhf
from kl_plugins.cli.patches import patches
from kl_plugins.cli.report import report
from kl_plugins.cli.trl import FLAGS_OF_TRL, trl

# Plain help: rich's panels cut the names of options at 80 columns, and take a tenth of a second to load.
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kl_plugins {__version__}")
        raise typer.Exit


@app.callback()
def kl_plugins(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """KL regularization for LLM reinforcement learning whose gradient is what its name says."""


app.command()(explain)
app.command()(audit)
app.command()(curves)
app.command()(doctor)
app.command()(report)
app.command()(patches)
app.command(**FLAGS_AFTER_OURS)(openrlhf)
app.command(**FLAGS_OF_TRL)(trl)


def main() -> None:
    """The console script."""
    app()
