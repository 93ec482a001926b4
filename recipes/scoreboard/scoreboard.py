"""The KL gradients of eight frameworks, by their own functions, on the same work.

What:      TRL, OpenRLHF, verl, SkyRL, Unsloth, ms-swift, tunix and kl_plugins: bias by exact enumeration, squared
           error of a batch of 64, dead zones, float32, masks; the same on small language models, trained on the spot.
           Frameworks that can't be imported are named and left out.
Hardware:  2 CPU cores, no GPU; the network with --install
How long:  2-4 minutes; a minute more with --install, the first time
Launch:    make scoreboard                             # puts what is missing into .cache, renews docs/scoreboard.md
           python recipes/scoreboard/scoreboard.py     # with whatever is installed
           python recipes/scoreboard/scoreboard.py --only TRL --no-language-model

Writes scoreboard.json, scoreboard.md, scoreboard.svg and scoreboard.png to --out (runs/scoreboard); with --page the
PNG goes to the folder images beside the page. `frameworks.py` gets at each one's own functions, `worker.py` measures
one framework in a process of its own, `language_model.py` trains the models, and `pages.py` writes everything down.
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
from pathlib import Path
from typing import Annotated, Any

import language_model
import pages
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
GOALS = {"bias": 1e-10, "mse": 0.25, "language_model": 0.6, "float32": 1e3}
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
    rows = {each["framework"]: each["rows"] for each in result["frameworks"]}
    ours = rows.get("kl_plugins", [])
    # Of the sequence gradient, which is what errors are measured against.
    exact = [row for row in ours if row["name"].startswith("exact_in_reward") and row["claims"] == "reverse_kl"]
    others = {name: some for name, some in rows.items() if name != "kl_plugins"}
    peers = [row | {"name": f"{name} {row['name']}"} for name, some in others.items() for row in some]
    found: dict[str, Any] = {"bias": {"goal": GOALS["bias"], "measured": _own_bias(ours)}}
    if not exact or not peers:
        return found
    found["mse"] = {"goal": GOALS["mse"]} | _enumerated(exact, peers)
    for task in exact[0]["language_model"]:
        found[f"language_model, {task}"] = {"goal": GOALS["language_model"]} | _on_language_model(task, exact, peers)
    reverse = [row for row in ours if row["claims"] in ("reverse_kl", "local_reverse_kl")]
    right = min(min(abs(end) for end in row["range"]["right"]) for row in reverse)
    return found | {"float32": {"goal": GOALS["float32"], "measured": right}}


def _unbiased(row: dict[str, Any]) -> bool:
    return bool(row["bias"]["on_policy"]["worst"]["reverse_kl"] <= 1e-6)


def _enumerated(exact: list[dict[str, Any]], peers: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means over the nine policies of the ratio to whichever peer is best on each."""

    def each(row: dict[str, Any]) -> list[float]:
        values: list[float] = row["mse"]["on_policy"]["of_each"]
        return values

    def over(own: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, float | None]:
        best = [min(values) for values in zip(*map(each, others), strict=True)]
        return {"value": _mean([a / b for a, b in zip(each(own), best, strict=True)]), "low": None, "high": None}

    own, peer = (min(some, key=lambda row: _mean(each(row))) for some in (exact, peers))
    unbiased = [row for row in peers if _unbiased(row)]
    return {
        "measured": over(own, peers),
        "row": own["name"],
        "best_peer": f"on each policy; overall {peer['name']}",
        "best_unbiased": "on each policy",
        "against_unbiased": over(own, unbiased) if unbiased else {"value": math.nan},
    }


def _on_language_model(task: str, exact: list[dict[str, Any]], peers: list[dict[str, Any]]) -> dict[str, Any]:
    def errors(row: dict[str, Any], what: str = "mse") -> list[float]:
        values: list[float] = row["language_model"][task]["on_policy"][what]
        return values

    def over(own: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
        return language_model.jackknife([a / b for a, b in zip(errors(own), errors(other), strict=True)])

    own, peer = (min(some, key=lambda row: errors(row)[0]) for some in (exact, peers))
    found = {"measured": over(own, peer), "row": own["name"], "best_peer": peer["name"]}
    unbiased = min(filter(_unbiased, peers), key=lambda row: errors(row)[0], default=None)
    found["best_unbiased"] = unbiased["name"] if unbiased else "none"
    found["against_unbiased"] = over(own, unbiased) if unbiased else {"value": math.nan}
    bias = max(errors(peer, "bias")[0], 0.0) ** 2  # the error is bias + variance / completions, ours has no bias
    if bias > 0:
        variances = [64 * (errors(row)[0] - square) for row, square in ((own, 0.0), (peer, bias))]
        found["ahead_from"] = (variances[0] - variances[1]) / bias
    return found


def _own_bias(ours: list[dict[str, Any]]) -> float:
    """The largest relative error of any principled configuration against what its name claims, with whole weights."""
    found = []
    for row in ours:
        settings = (
            row["bias"] if row["off_policy"] in ("prefix", "sequence") else {"on_policy": row["bias"]["on_policy"]}
        )
        found += [bias["worst"][row["claims"]] for bias in settings.values() if row["claims"] in bias["worst"]]
    return max(found, default=math.nan)


def _mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


if __name__ == "__main__":
    typer.run(main)
