"""The command line: `kl-plugins explain`, `curves`, `audit`, `scoreboard`, `report`, `doctor` and the launchers."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from kl_plugins.cli.audit import audit
from kl_plugins.cli.curves import curves
from kl_plugins.cli.doctor import doctor, patches
from kl_plugins.cli.explain import explain
from kl_plugins.cli.report import report
from kl_plugins.errors import ConfigError, PatchError, UnknownLossError
from kl_plugins.integration.flags import with_flags
from kl_plugins.openrlhf.plan import OpenRLHFOptions
from kl_plugins.scoreboard.command import scoreboard

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

app.command()(explain)
app.command()(audit)
app.command()(curves)
app.command()(doctor)
app.command()(report)
app.command()(patches)
app.command()(scoreboard)


def openrlhf(context: typer.Context, dry_run: bool, **options: Any) -> None:
    """Run OpenRLHF with the KL of your choice in every process.

    OPENRLHF_FLAGS, after a `--`, are those of openrlhf.cli.train_ppo_ray; --algo.kl.init_coef is the coefficient.
    """
    from kl_plugins.openrlhf.driver import launch

    try:
        launch(OpenRLHFOptions(**options), context.args, dry_run=dry_run)
    except ModuleNotFoundError as error:
        where = "pip install flash-attn, or without a GPU put recipes/openrlhf_cpu on PYTHONPATH"
        what = f"OpenRLHF can't be imported: {error}; {where if error.name == 'flash_attn' else 'install it'}"
        Console(stderr=True).print(f"[red]error:[/red] {what}", soft_wrap=True)
        raise typer.Exit(2) from error
    except (UnknownLossError, ConfigError, PatchError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True)
        raise typer.Exit(2) from error


DRY_RUN = typer.Option("--dry-run", help="Check everything, say what would be done, and stop before Ray starts.")
app.command(options_metavar="--kl NAME [OPTIONS] -- OPENRLHF_FLAGS", context_settings={"allow_extra_args": True})(
    with_flags(openrlhf, OpenRLHFOptions, dry_run=(Annotated[bool, DRY_RUN], False))
)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    options_metavar="grpo|rloo --kl NAME [TRL_OPTIONS]",
)
def trl(context: typer.Context) -> None:
    """Run TRL's own command line with the KL of your choice in every process.

    All options are TRL's; its configs have the kl_* ones, too, here and in a --config file. `kl-plugins trl grpo
    --help` lists them.
    """
    from kl_plugins.trl.launcher import run

    if not context.args or context.args[0] in ("-h", "--help"):
        Console().print(context.get_help(), markup=False, highlight=False)
        raise typer.Exit(0 if context.args else 2)
    try:
        code = run(context.args)
    except (UnknownLossError, ConfigError, PatchError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True)
        raise typer.Exit(2) from error
    raise typer.Exit(code)


def main() -> None:
    """The console script."""
    app()
