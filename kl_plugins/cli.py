"""The command line: `kl-plugins explain`, `curves`, `audit`, `scoreboard`, `report`, `doctor` and the launchers."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kl_plugins.audit.command import audit
from kl_plugins.curves import curves
from kl_plugins.doctor import doctor
from kl_plugins.errors import ConfigError, PatchError, UnknownLossError
from kl_plugins.explain import explain
from kl_plugins.integration.flags import with_flags
from kl_plugins.openrlhf.plan import OpenRLHFOptions
from kl_plugins.patching import changes, load_patches
from kl_plugins.patching.versions import installed_version
from kl_plugins.run_report import report
from kl_plugins.scoreboard.command import scoreboard

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

app.command()(explain)
app.command()(audit)
app.command()(curves)
app.command()(doctor)
app.command()(report)
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


@app.command()
def patches(host: Annotated[str, typer.Argument(help="The name of a file in patches/.")] = "openrlhf") -> None:
    """Compare what is replaced inside a host (patches/HOST.toml) with the version that is installed."""
    try:
        known = load_patches(host)
        found = changes(known)
    except PatchError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True)
        raise typer.Exit(2) from error
    title = f"{host} {installed_version(host) or '(not installed)'}; tested: {', '.join(known.tested)}"
    table = Table(title=title, title_justify="left")
    table.add_column("target", overflow="fold")
    table.add_column("state")
    table.add_column("digest, signature or reason", overflow="fold")
    for change in found:
        state = f"[green]{change.state}[/green]" if change.state == "same" else f"[red]{change.state}[/red]"
        detail = change.detail or change.digest + (f"\n{change.signature}" if change.state == "signature" else "")
        table.add_row(change.target, state, detail)
    Console().print(table)
    if any(change.state != "same" for change in found):
        raise typer.Exit(1)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
