"""What the KL terms of eight frameworks train like, and their gradients, by their own functions, on the same work.

What:      TRL, OpenRLHF, verl, SkyRL, Unsloth, ms-swift, tunix and kl_plugins: the share of the attainable
           E[R] - beta KL that each one's default reaches; bias by exact enumeration, dead zones, float32, masks;
           squared error of a batch of 64, there and on small language models, trained on the spot.
           Frameworks that can't be imported are named and left out.
Hardware:  2 CPU cores, no GPU; the network with --install
How long:  2-4 minutes; a minute more with --install, the first time
Launch:    make scoreboard                             # puts what is missing into .cache, renews docs/scoreboard.md
           python recipes/scoreboard/scoreboard.py     # with whatever is installed
           python recipes/scoreboard/scoreboard.py --only TRL --no-language-model

Writes scoreboard.json, scoreboard.md, scoreboard.svg and scoreboard.png to --out (runs/scoreboard); with --page the
PNG goes to the folder images beside the page. `frameworks.py` gets at each one's own functions, `trained.py` trains
with them, `worker.py` measures one framework in a process of its own, `language_model.py` trains the models, and
`pages.py` and `standings.py` write everything down.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import language_model
import pages
import standings
import torch
import typer
from frameworks import FRAMEWORKS, NOT_INSTALLABLE
from rich.console import Console

import kl_plugins
from kl_plugins.errors import ConfigError
from kl_plugins.patching.versions import installed_version
from kl_plugins.report.page import command_line

FOLDER = Path(".cache/frameworks")
KL_PLUGINS = Path(kl_plugins.__file__).parents[1]
WORKER = Path(__file__).with_name("worker.py")
GOALS = {"share": 0.98, "bias": 1e-10, "float32": 1e3}
"""What kl_plugins set out to reach; each is reported as measured."""


def main(
    out: Annotated[Path, typer.Option(help="Where scoreboard.json, .md, .svg and .png go.")] = Path("runs/scoreboard"),
    frameworks: Annotated[Path, typer.Option(help="Frameworks that aren't installed are looked for here.")] = FOLDER,
    install: Annotated[bool, typer.Option("--install", help="First put the missing ones there, with pip.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only these frameworks (and kl_plugins).")] = None,
    with_model: Annotated[
        bool, typer.Option("--language-model/--no-language-model", help="Train small ones, measure on them, too.")
    ] = True,
    page: Annotated[
        Path | None, typer.Option(help="Replace the table between this file's scoreboard markers.")
    ] = None,
) -> None:
    """Measure the KL gradients of every framework at hand, by its own functions, on the same work."""
    console = Console()
    try:
        if page is not None:
            pages.check_markers(page)  # before minutes go by
        found = collect(frameworks, install=install, only=only, with_model=with_model, console=console)
        pages.show(found, console)
        written = pages.write_all(found, out, page=page)
    except (ConfigError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True)
        raise typer.Exit(2) from error
    console.print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)


def collect(
    folder: Path, *, install: bool, only: list[str] | None, with_model: bool, console: Console
) -> dict[str, Any]:
    """Measure each framework, and return all of it as what scoreboard.json holds."""
    names = {each.name.lower(): each for each in FRAMEWORKS}
    if unknown := [name for name in only or [] if name.lower() not in names]:
        raise ConfigError(f"--only {', '.join(unknown)}: choose from {', '.join(each.name for each in FRAMEWORKS)}")
    chosen = {"kl_plugins", *map(str.lower, only)} if only else set(names)
    asked = [each for name, each in names.items() if name in chosen]
    started = time.perf_counter()
    measured, left_out = [], dict(NOT_INSTALLABLE) if not only else {}
    with tempfile.TemporaryDirectory(prefix="kl_plugins-") as scratch:
        model, about = "", dict[str, Any]()
        if with_model:
            with console.status("training a small language model"):
                model, about = _language_model(Path(scratch))
        for each in asked:
            own = folder / each.distribution
            if install and each.requires and not own.exists() and installed_version(each.distribution) is None:
                with console.status(f"{each.name}: pip install --target {own}"):
                    _install(each.requires, own)
            with console.status(f"measuring {each.name}"):
                found = _measure(each.name, own if own.exists() else None, model, Path(scratch) / "found.json")
            if isinstance(found, str):
                left_out[each.name] = found
                console.print(f"{each.name}: left out, {found}", markup=False, soft_wrap=True)
            else:
                measured.append(found)
                seconds = sum(found["seconds"].values())
                console.print(f"{each.name} {found['version']}: {len(found['rows'])} terms, {seconds:.0f} s")
    result: dict[str, Any] = {
        "command": command_line(),
        "python": platform.python_version(),
        "seconds": time.perf_counter() - started,
        "frameworks": measured,
        "left_out": left_out,
        "language_model": about,
    }
    result["goals"] = goals(result)
    return result


def _language_model(scratch: Path) -> tuple[str, dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        drawn = {task: language_model.draw(language_model.train(task)) for task in language_model.TASKS}
    finally:
        torch.set_num_threads(threads)
    language_model.save(drawn, scratch / "model.pt")
    return str(scratch / "model.pt"), {task: each["about"] for task, each in drawn.items()}


def _install(requires: tuple[str, ...], folder: Path) -> None:
    """Put packages into `folder` with pip, without their dependencies, all of them or none."""
    partial = folder.with_name(f".{folder.name}-partial")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q", "install", "--no-compile")
    done = subprocess.run(
        [*pip, "--no-deps", "--upgrade", "--target", str(partial), *requires], capture_output=True, text=True
    )
    if done.returncode == 0:
        partial.rename(folder)


def _measure(name: str, folder: Path | None, model: str, out: Path) -> dict[str, Any] | str:
    """The worker's findings, or why there are none."""
    out.unlink(missing_ok=True)
    quiet = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    same = [str(KL_PLUGINS), *filter(None, [os.environ.get("PYTHONPATH")])]  # the kl_plugins that runs here
    quiet["PYTHONPATH"] = os.pathsep.join(same)
    command = [sys.executable, str(WORKER), name, str(folder.resolve()) if folder else "", model, str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ | quiet, cwd=out.parent
    )
    if done.returncode == 0 and out.exists():
        found: dict[str, Any] = json.loads(out.read_text())
        return found
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"its process ended with code {done.returncode}"


def goals(result: dict[str, Any]) -> dict[str, Any]:
    """Name -> what kl_plugins set out to reach, and what was measured."""
    ours = next((each["rows"] for each in result["frameworks"] if each["framework"] == "kl_plugins"), [])
    found: dict[str, Any] = {"bias": {"goal": GOALS["bias"], "measured": _own_bias(ours)}}
    reverse = [row for row in ours if row["claims"] in ("reverse_kl", "local_reverse_kl")]
    if reverse:
        right = min(min(abs(end) for end in row["range"]["right"]) for row in reverse)
        found["float32"] = {"goal": GOALS["float32"], "measured": right}
    tables = {problem: standings.shares(result, problem) for problem in standings.problems(result)}
    if any(standings.OURS in table for table in tables.values()):
        on_policy = {problem: next(iter(table[standings.OURS].values())) for problem, table in tables.items()}
        found["attained"] = {problem: asdict(share) for problem, share in on_policy.items()}
    if any(len(table) > 1 for table in tables.values()):
        found["ahead"] = _ahead(tables)
    return found


def _ahead(tables: dict[str, dict[str, dict[str, standings.Share]]]) -> dict[str, Any]:
    """In how many regimes ours is ahead of every default, and each default that it is not ahead of."""
    regimes, others = [], []
    for problem, table in tables.items():
        for regime, ours in table[standings.OURS].items():
            regimes.append((problem, regime))
            for name, cells in table.items():
                verdict = cells[regime].against(ours)
                if name != standings.OURS and verdict != "behind":
                    others.append((problem, regime, name, verdict))
    clear = [each for each in regimes if each not in {(problem, regime) for problem, regime, *_ in others}]
    return {"regimes": f"{len(clear)} of {len(regimes)} regimes", "not": others}


def _own_bias(ours: list[dict[str, Any]]) -> float:
    """The largest relative error of any principled configuration against what its name claims, with whole weights."""
    found = []
    for row in ours:
        settings = (
            row["bias"] if row["off_policy"] in ("prefix", "sequence") else {"on_policy": row["bias"]["on_policy"]}
        )
        found += [bias["worst"][row["claims"]] for bias in settings.values() if row["claims"] in bias["worst"]]
    return max(found, default=math.nan)


if __name__ == "__main__":
    typer.run(main)
