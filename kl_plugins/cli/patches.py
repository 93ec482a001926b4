"""`kl-plugins patches`: what is replaced inside a host, against the version that is installed."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer
from rich.console import Console

from kl_plugins.cli.errors import user_errors
from kl_plugins.cli.host_imports import module_problem
from kl_plugins.cli.layout import paragraph
from kl_plugins.patching import Change, changes, load_patches
from kl_plugins.patching.versions import installed_version


def patches(host: Annotated[str, typer.Argument(help="The name of a file in patches/.")] = "openrlhf") -> None:
    """Compare an installed host with the versions that were tested.

    Of every function that is replaced or relied on (patches/HOST.toml): whether its source and signature are those of
    a tested version. Exit code 1 if any isn't the same.
    """
    with user_errors():
        known = load_patches(host)
        with redirect_stdout(sys.stderr):  # what hosts print while they are imported
            found = changes(known)
    console, problems = Console(), set[str]()
    paragraph(console, f"{host} {installed_version(host)}; tested: {', '.join(known.tested)}")
    modules: dict[str, list[Change]] = {}  # a file's targets may go back to a module
    for change in found:
        modules.setdefault(change.target.partition(":")[0], []).append(change)
    for module, targets in modules.items():
        problem = module_problem(host, module) if all(change.state == "missing" for change in targets) else ""
        console.print()
        paragraph(console, module, style="bold")
        if problem:
            paragraph(console, "not compared, as above" if problem in problems else problem, style="red", indent=2)
            problems.add(problem)
        for change in targets:
            _show(console, change, compared=not problem)
    if any(change.state != "same" for change in found):
        raise typer.Exit(1)


def _show(console: Console, change: Change, *, compared: bool) -> None:
    """State and name of a target, and what is needed to add the host's version to the file."""
    name, good = change.target.partition(":")[2], change.state == "same"
    if not compared:
        paragraph(console, name, indent=2)
        return
    paragraph(console, name, label=f"{change.state:9}", label_style="green" if good else "red", indent=2)
    for text in (change.digest, "" if good else change.signature, change.detail):
        if text:
            paragraph(console, text, indent=4)
