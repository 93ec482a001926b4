"""`kl-plugins explain`: what gradient a configuration has, when it is biased, and what to use instead."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kl_plugins.errors import ConfigError, UnknownLossError
from kl_plugins.registry import KLLoss, all_losses, get_loss

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
