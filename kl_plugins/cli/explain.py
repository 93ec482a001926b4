"""`kl-plugins explain`: what gradient a configuration has, when it is biased, and what to use instead."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kl_plugins.core.registry import KLLoss, all_losses, get_loss
from kl_plugins.errors import ConfigError, UnknownLossError
from kl_plugins.explain import explain_words
from kl_plugins.explain.verdict import MEANING, OFF_POLICY, TRAINERS, Explanation, not_offered

_FILES = (".yaml", ".yml", ".json")


def explain(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME | FILE] [-- FLAGS]",
            help="A KL configuration by name, without one all of them; or a whole training configuration: a YAML or "
            "JSON file of TRL's options, flags of TRL, or with --host openrlhf flags of OpenRLHF and our --kl ones.",
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="trl or openrlhf, whose flags these are.")] = None,
    trainer: Annotated[str | None, typer.Option(help=f"Of TRL: {', '.join(TRAINERS)}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same for machines.")] = False,
) -> None:
    """What gradient a configuration has, when it is biased, and what to use instead.

    Of a whole training configuration: which KL the host really applies with it.
    Then the exit code is 0 if it is principled (or another divergence, which is
    said), 1 if its gradient is zero, biased or void, and 2 for bad input.

    \b
    kl-plugins explain k3_as_loss
    kl-plugins explain grpo.yaml
    kl-plugins explain grpo.yaml -- --num_iterations 4
    kl-plugins explain --trainer rloo -- --beta 0.05 --use_vllm true
    kl-plugins explain --host openrlhf -- --algo.kl.use_loss --algo.kl.estimator k3
    """
    console = Console()
    try:
        if _is_configuration(words or []) or host or trainer:
            found = explain_words(words or [], host=host, trainer=trainer)
            if as_json:
                print(json.dumps(asdict(found), indent=2))
            else:
                _show(console, found)
            raise typer.Exit(found.exit_code)
        if len(words or []) > 1:
            raise ConfigError(f"one name was expected, found {' '.join(words or [])}: give flags after --")
        losses = {name: get_loss(name) for name in words} if words else all_losses()
        if as_json:
            print(json.dumps({name: _as_data(loss) for name, loss in losses.items()}, indent=2))
        elif words:
            _explain_loss(console, losses[words[0]])
        else:
            _list_losses(console, losses)
    except (UnknownLossError, ConfigError) as error:
        Console(stderr=True).print(Text.assemble(("error: ", "red"), str(error)), soft_wrap=True)
        raise typer.Exit(2) from error


def _is_configuration(words: Sequence[str]) -> bool:
    """Whether these are a file or flags, not a name."""
    return bool(words) and (words[0].startswith("--") or words[0].endswith(_FILES) or Path(words[0]).is_file())


def _as_data(loss: KLLoss) -> dict[str, Any]:
    keys = ("name", "summary", "default_credit", "expected", "instead", "may_overflow", "source")
    return {key: getattr(loss, key) for key in keys} | {"gradient_of": dict(loss.gradient_of)}


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
    console.print("More on one of them: kl-plugins explain NAME; on yours: kl-plugins explain FILE, or -- FLAGS")


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


_COLOURS = {"principled": "green", "another divergence": "yellow"}


def _show(console: Console, found: Explanation) -> None:
    """The page of a whole configuration."""
    given = ", ".join(f"{name}={found.configuration[name]}" for name in found.given) or "nothing that is about the KL"
    verdict = Text(found.verdict, style=f"bold {_COLOURS.get(found.verdict, 'red')}")
    console.print(Text.assemble((found.host, "bold"), ": ", verdict), f"(exit code {found.exit_code})\n")
    page = Table.grid(padding=(0, 2))
    page.add_column(style="bold", no_wrap=True)
    page.add_column(overflow="fold")
    rows = {
        "given": given,
        "ignored": ", ".join(found.ignored),
        "assumed": "\n".join(found.assumed),
        "KL term": f"{found.beta:g} times, in the {found.placement}: {found.term}",
        "coefficient": f"{found.coefficient}   of the score grad log policy; u = log policy - log reference",
        "gradient": f"{found.gradient_of}: {found.meaning}",
        "samples": found.samples,
        "stale samples": found.stale,
        "engine mismatch": found.engine,
        "variance": found.variance,
        "dead zone": found.dead_zone or "none",
        "overflow": found.overflow,
        "read from": found.facts,
    }
    for label, text in rows.items():
        if text:
            page.add_row(label, Text(text))
    console.print(page)
    for flaw in found.flaws:
        console.print(Text.assemble((f"\n{flaw.effect}: ", "bold red"), flaw.says), end="")
    for note in found.notes:
        console.print(Text.assemble(("\nnote: ", "bold"), note), end="")
    if found.flaws or found.notes:
        console.print()
    instead = Text(found.instead, style="bold") if found.change else Text("nothing has to change")
    console.print(Text.assemble("\nuse instead: ", instead), soft_wrap=True)
    console.print()
    _show_elsewhere(console, found)


def _show_elsewhere(console: Console, found: Explanation) -> None:
    if not found.elsewhere:
        return
    table = Table(title=f"What {found.estimator} is elsewhere", title_justify="left", box=box.SIMPLE_HEAD, leading=1)
    for column, width in (("where", 36), ("coefficient", 24), ("on-policy gradient", 24)):
        table.add_column(column, overflow="fold", min_width=width)
    for row in found.elsewhere:
        where = Text.assemble((row["host"], "bold"), " <- yours" if row["yours"] else "", f"\n{row['setting']}")
        dead = f"\nexactly 0 at {row['dead_zone']}" if row["dead_zone"] else ""
        table.add_row(where, row["coefficient"], Text.assemble(row["gradient_of"], (dead, "red")))
    console.print(table)
    others = [f"{host} has {used} only" for host, used in not_offered(found.estimator).items()]
    if others:
        console.print(f"Not offered: {'; '.join(others)}.", markup=False)
