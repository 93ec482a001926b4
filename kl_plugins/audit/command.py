"""`kl-plugins audit`: bias and variance of every KL term's gradient on your own model, reference and prompts."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kl_plugins.audit.data import Rollouts, read_prompts, read_rollouts
from kl_plugins.errors import ConfigError, refuse

if TYPE_CHECKING:
    from kl_plugins.audit.collect import Collected
    from kl_plugins.audit.model import Pair
    from kl_plugins.audit.sketch import Sketch

INTERRUPTED = 130
FEW = 64
DTYPES = ("float32", "bfloat16", "float16")


def audit(
    model: Annotated[str | None, typer.Option(help="The policy: a folder or the name of a model on the hub.")] = None,
    reference: Annotated[str | None, typer.Option(help="The model that the KL is taken to, likewise.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines; completions are drawn from the policy.")] = None,
    prompt_column: Annotated[str, typer.Option(help="Where they hold a text, or a chat's messages.")] = "prompt",
    rollouts: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --prompts: saved completions as JSON lines of prompt_ids (or the prompt column), "
            "completion_ids and, if another policy or engine drew them, behavior_logp."
        ),
    ] = None,
    completions: Annotated[int, typer.Option(min=2, help="Of each prompt, to audit.")] = 8,
    target_completions: Annotated[int, typer.Option(min=2, help="Others of each prompt, for the target.")] = 32,
    max_prompts: Annotated[int, typer.Option(min=1, help="More than these are thinned out at random.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where a completion ends at the latest.")] = 64,
    batch: Annotated[
        int, typer.Option(min=1, help="Completions in a forward pass; memory grows with it, tokens and vocabulary.")
    ] = 8,
    mse_batch: Annotated[int, typer.Option(min=1, help="Completions that the squared error is stated for.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the choice of prompts, the sampling and the resampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto is a GPU if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"Of both models: {', '.join(DTYPES)}.")] = "float32",
    vllm: Annotated[
        bool, typer.Option("--vllm", help="Draw what is audited with vLLM, off-policy by its own log-probs.")
    ] = False,
    hosts: Annotated[bool, typer.Option(help="Run the KL terms of TRL, OpenRLHF and verl, too.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for audit.html and audit.json.")] = Path("audit"),
) -> None:
    """Bias and variance of every KL term's gradient, on your own model, reference and prompts.

    Every configuration of kl_plugins and what the installed hosts do themselves, against the gradients of the KL of
    whole completions and of the next-token KLs. Ctrl-C leaves a report on the prompts that are done (exit code 130).
    """
    options = dict(locals())
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    console = Console(stderr=True)
    try:
        _check(model, reference, prompts, rollouts, dtype, vllm)
        result = run_audit(console=console, **options)
    except (ConfigError, ValueError) as error:
        console.print(Text.assemble(("error: ", "red"), str(error)), soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        console.print("Interrupted before a prompt was done: there is nothing to report.")
        raise typer.Exit(INTERRUPTED) from None
    written = write_report(result, out)
    _show(Console(), result)
    for path in written:
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    if result["status"] != "complete":
        raise typer.Exit(INTERRUPTED)


def run_audit(
    *,
    model: str,
    reference: str,
    prompts: Path | None,
    prompt_column: str,
    rollouts: Path | None,
    completions: int,
    target_completions: int,
    max_prompts: int,
    max_new_tokens: int,
    batch: int,
    mse_batch: int,
    seed: int,
    device: str,
    dtype: str,
    vllm: bool,
    hosts: bool,
    out: Path,
    console: Console,
) -> dict[str, Any]:
    """Measure; returns what `audit.json` holds. Arguments are the options of the command.

    Raises `ConfigError` for bad input, `ValueError` for log-probs that aren't finite, and `KeyboardInterrupt` if there
    was an interruption before a prompt was done.
    """
    if rollouts is not None:
        units: list[Any] = list(read_rollouts(rollouts, prompt_column, limit=max_prompts, seed=seed))
    else:
        units = read_prompts(prompts or Path(), prompt_column, limit=max_prompts, seed=seed)
    console.print("Loading the models", "and the hosts" if hosts else "", highlight=False)
    import torch

    from kl_plugins.audit.collect import collect
    from kl_plugins.audit.configurations import host_configurations, own_configurations
    from kl_plugins.audit.engine import vllm_rollouts
    from kl_plugins.audit.model import Pair
    from kl_plugins.audit.sketch import Sketch

    torch.manual_seed(seed)
    pair = Pair(model, reference, device=device, dtype=dtype)
    if vllm:
        console.print("Drawing completions with vLLM")
        ids = [pair.prompt_ids(prompt) for prompt in units]
        units = list(
            vllm_rollouts(
                model,
                ids,
                completions=completions,
                max_new_tokens=min(pair.room(prompt, max_new_tokens) for prompt in ids),
                ends=pair.ends,
                seed=seed,
                dtype=dtype,
            )
        )
    off_policy = isinstance(units[0], Rollouts) and units[0].behavior_logp is not None
    theirs, left_out = host_configurations() if hosts else ([], ["hosts: --no-hosts was given"])
    configurations = [*own_configurations(off_policy=off_policy), *theirs]
    sketch = Sketch(pair.vocabulary, pair.hidden, seed=seed)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("Prompts", total=len(units))
        found = collect(
            pair,
            units,
            configurations,
            completions=completions,
            target_completions=target_completions,
            max_new_tokens=max_new_tokens,
            batch=batch,
            sketch=sketch,
            seed=seed,
            done=lambda count: progress.update(bar, completed=count),
        )
    if not found.prompts:
        raise KeyboardInterrupt
    source = "drawn with vLLM" if vllm else "as saved" if rollouts else "drawn from the policy"
    policy = "weighed against their behavior_logp" if off_policy else "on-policy"
    return {
        "status": "complete" if found.complete else "partial",
        "notices": _notices(found, shortest=pair.shortest if pair.shortest < max_new_tokens else None),
        "data": {
            "model": model,
            "reference": reference,
            "prompts": found.prompts,
            "prompts_asked": found.asked,
            "completions": int(found.sums["completions"]),
            "target_completions": target_completions,
            "max_new_tokens": max_new_tokens,
            "tokens": int(found.sums["tokens"]),
            "mean_length": found.sums["tokens"] / found.sums["completions"],
            **{name: found.sums[name] / found.sums["tokens"] for name in ("exact_kl", "k1", "k2", "k3")},
            **{name: found.sums[name] for name in ("lowest", "highest")},
            "off_policy": off_policy,
            "sampling": f"{source}, {policy}",
            "mse_batch": mse_batch,
            "seed": seed,
            "parameters": _parameters(pair, sketch),
        },
        "cost": {
            "seconds": round(found.seconds, 1),
            "tokens_through_both_models": found.forward_tokens,
            "peak_memory_mib": _peak_memory(),
            "device": str(pair.device),
            "dtype": dtype,
        },
        "left_out": left_out,
        **found.statistics(batch=mse_batch),
    }


def write_report(result: dict[str, Any], out: Path) -> list[Path]:
    """Write `audit.html` and `audit.json` into the folder `out`; returns their paths."""
    from kl_plugins import page
    from kl_plugins.audit.pages import audit_page

    made = {"command": page.command_line(), "versions": page.versions()}
    text = json.dumps(made | result, indent=1, allow_nan=False)
    return [page.write(out / "audit.json", text + "\n"), page.write(out / "audit.html", audit_page(result))]


def _check(
    model: str | None, reference: str | None, prompts: Path | None, rollouts: Path | None, dtype: str, vllm: bool
) -> None:
    """All that is wrong with the options, at once."""
    problems = []
    for name, value in (("--model", model), ("--reference", reference)):
        if not value:
            problems.append(
                f"{name} wasn't given: an audit is of your own models; recipes/make_math_model.py makes a tiny one"
            )
    if (prompts is None) == (rollouts is None):
        both = "both" if prompts else "neither"
        problems.append(f"{both} of --prompts and --rollouts were given: give one of them")
    if rollouts is not None and vllm:
        problems.append("--vllm draws completions, but --rollouts has them already: leave one of them out")
    if dtype not in DTYPES:
        problems.append(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")
    refuse(problems)


def _notices(found: Collected, shortest: int | None) -> list[str]:
    notices = []
    if shortest is not None:
        notices.append(f"The model has positions for {shortest} new tokens after the longest prompt, not for more.")
    if not found.complete:
        notices.append(
            f"Partial: interrupted after {found.prompts} of {found.asked} prompts. What follows is about those."
        )
    if found.sums["completions"] < FEW:
        notices.append(f"Only {found.sums['completions']:.0f} completions: intervals are too narrow below {FEW}.")
    lost = sorted({c.name for c, counts in zip(found.configurations, found.counts, strict=True) if counts.nonfinite})
    if lost:
        notices.append(f"Tokens with a coefficient that is NaN or inf were counted as 0: {', '.join(lost)}.")
    return notices


def _parameters(pair: Pair, sketch: Sketch) -> str:
    what = f"the language-model head's weight ({pair.vocabulary:,} x {pair.hidden:,})"
    if sketch.exact:
        return f"{what}, all of them"
    error = math.sqrt(8 / sketch.size)
    return (
        f"{what}, in a sketch of {sketch.size:,} numbers (it adds an error of about {error:.0%} to norms and cosines)"
    )


def _peak_memory() -> int:
    """MiB; of the process, or of the GPU where one was used."""
    torch = sys.modules["torch"]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated() >> 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _show(console: Console, result: dict[str, Any]) -> None:
    """The summary in the terminal."""
    from kl_plugins.audit.pages import size

    said = {None: "?", True: "[red]no[/red]", False: "[green]yes[/green]"}
    table = Table(title="KL gradients: distance to the target, relative to its norm", title_justify="left", box=SIMPLE)
    for column in ("term", "declared", "found", "whole KL", "next-token KLs", "dead"):
        word = column in ("term", "declared", "found")
        table.add_column(column, justify="left" if word else "right", no_wrap=word)
    for row in result["rows"]:
        own = row["own_name"]
        sizes = (size(row["against"][of]["bias"]) for of in ("reverse_kl", "local_reverse_kl"))
        found = said[own["seen"]] if own else ""
        table.add_row(row["label"], row["gradient_of"] or "a KL", found, *sizes, f"{row['dead']:.1%}")
    console.print(table)
    for line in (*result["notices"], *result["left_out"]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


__all__ = ["audit", "run_audit", "write_report"]
