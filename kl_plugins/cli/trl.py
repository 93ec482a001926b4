"""`kl-plugins trl`: TRL's own command line with a KL of ours."""

from __future__ import annotations

from typing import Any

import typer

from kl_plugins.cli.errors import user_errors
from kl_plugins.errors import PatchError
from kl_plugins.patching.versions import installed_version

# How typer registers the command: every option is TRL's, also --help after a trainer.
FLAGS_OF_TRL: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    "options_metavar": "grpo|rloo --kl NAME [TRL_OPTIONS]",
}


def trl(context: typer.Context) -> None:
    """Run TRL's own command line with the KL of your choice.

    It is used in every process. All options are TRL's; its configs have the kl_* ones, too, here and in a --config
    file. `kl-plugins trl grpo --help` lists them.
    """
    if not context.args or context.args[0] in ("-h", "--help"):
        typer.echo(context.get_help())
        raise typer.Exit(0 if context.args else 2)
    with user_errors():
        if not installed_version("trl"):
            raise PatchError("trl isn't installed: pip install 'kl_plugins[trl]'")
        from kl_plugins.trl.launcher import run

        code = run(context.args)
    raise typer.Exit(code)
