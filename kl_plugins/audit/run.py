"""The audit: measures bias and variance of every KL term's gradient on a model, its reference and prompts."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kl_plugins.audit.data import Rollouts, read_prompts, read_rollouts
from kl_plugins.errors import refuse

if TYPE_CHECKING:
    from kl_plugins.audit.collect import Collected
    from kl_plugins.audit.model import Pair
    from kl_plugins.audit.sketch import Sketch

FEW = 64
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """What is audited, and how much of it. Raises `ConfigError` with all that is wrong at once."""

    model: str = ""
    """The policy: a folder or the name of a model on the hub."""
    reference: str = ""
    """The model that the KL is taken to: a folder or the name of a model on the hub."""
    prompts: Path | None = None
    """JSON lines; completions are drawn from the policy."""
    prompt_column: str = "prompt"
    """The column of `prompts` or `rollouts` that holds a text, or a chat's messages."""
    rollouts: Path | None = None
    """Instead of `prompts`: saved completions as JSON lines, see `data.read_rollouts`."""
    completions: int = 8
    """Completions of each prompt that are audited; at least 2."""
    target_completions: int = 32
    """Other completions of each prompt, which the target is measured on; at least 2."""
    max_prompts: int = 64
    """If there are more prompts, so many are chosen at random."""
    max_new_tokens: int = 64
    """Tokens after which a completion ends at the latest."""
    batch: int = 8
    """Completions in a forward pass."""
    mse_batch: int = 64
    """Completions that the squared error is stated for."""
    seed: int = 0
    """Seed of the choice of prompts, the sampling and the resampling."""
    device: str = "auto"
    """`"auto"` is a GPU if there is one."""
    dtype: str = "float32"
    """The dtype of both models, one of `DTYPES`."""
    vllm: bool = False
    """Whether vLLM draws what is audited, off-policy by its own log-probs."""
    hosts: bool = True
    """Whether the KL terms of TRL, OpenRLHF and verl are run, too."""

    def __post_init__(self) -> None:
        problems = []
        for name, value in (("--model", self.model), ("--reference", self.reference)):
            if not value:
                problems.append(
                    f"{name} wasn't given: an audit is of your own models; recipes/make_math_model.py makes a tiny one"
                )
        if (self.prompts is None) == (self.rollouts is None):
            both = "both" if self.prompts else "neither"
            problems.append(f"{both} of --prompts and --rollouts were given: give one of them")
        if self.rollouts is not None and self.vllm:
            problems.append("--vllm draws completions, but --rollouts has them already: leave one of them out")
        least = {"completions": 2, "target_completions": 2, "max_prompts": 1, "max_new_tokens": 1, "batch": 1}
        for name, low in (least | {"mse_batch": 1}).items():
            if getattr(self, name) < low:
                problems.append(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {low}")
        if self.dtype not in DTYPES:
            problems.append(f"--dtype {self.dtype}: choose from {', '.join(DTYPES)}")
        refuse(problems)


def run_audit(
    options: AuditOptions, *, say: Callable[[str], None], done: Callable[[int, int], None]
) -> dict[str, Any]:
    """Measure; returns what `audit.json` holds. `say` is called with each step, `done` with prompts done and asked.

    Raises `ConfigError` for bad input, `ValueError` for log-probs that aren't finite, and `KeyboardInterrupt` if there
    was an interruption before a prompt was done.
    """
    if options.rollouts is not None:
        units: list[Any] = list(
            read_rollouts(options.rollouts, options.prompt_column, limit=options.max_prompts, seed=options.seed)
        )
    else:
        units = read_prompts(
            options.prompts or Path(), options.prompt_column, limit=options.max_prompts, seed=options.seed
        )
    say("Loading the models" + " and the hosts" * options.hosts)
    import torch

    from kl_plugins.audit.collect import collect
    from kl_plugins.audit.configurations import host_configurations, own_configurations
    from kl_plugins.audit.engine import vllm_rollouts
    from kl_plugins.audit.model import Pair
    from kl_plugins.audit.sketch import Sketch

    torch.manual_seed(options.seed)
    pair = Pair(options.model, options.reference, device=options.device, dtype=options.dtype)
    if options.vllm:
        say("Drawing completions with vLLM")
        ids = [pair.prompt_ids(prompt) for prompt in units]
        units = list(
            vllm_rollouts(
                options.model,
                ids,
                completions=options.completions,
                max_new_tokens=min(pair.room(prompt, options.max_new_tokens) for prompt in ids),
                ends=pair.ends,
                seed=options.seed,
                dtype=options.dtype,
            )
        )
    off_policy = isinstance(units[0], Rollouts) and units[0].behavior_logp is not None
    theirs, left_out = host_configurations() if options.hosts else ([], ["hosts: --no-hosts was given"])
    configurations = [*own_configurations(off_policy=off_policy), *theirs]
    sketch = Sketch(pair.vocabulary, pair.hidden, seed=options.seed)
    done(0, len(units))
    found = collect(
        pair,
        units,
        configurations,
        completions=options.completions,
        target_completions=options.target_completions,
        max_new_tokens=options.max_new_tokens,
        batch=options.batch,
        sketch=sketch,
        seed=options.seed,
        done=lambda count: done(count, len(units)),
    )
    if not found.prompts:
        raise KeyboardInterrupt
    source = "drawn with vLLM" if options.vllm else "as saved" if options.rollouts else "drawn from the policy"
    policy = "weighed against their behavior_logp" if off_policy else "on-policy"
    return {
        "status": "complete" if found.complete else "partial",
        "notices": _notices(found, shortest=pair.shortest if pair.shortest < options.max_new_tokens else None),
        "data": {
            "model": options.model,
            "reference": options.reference,
            "prompts": found.prompts,
            "prompts_asked": found.asked,
            "completions": int(found.sums["completions"]),
            "target_completions": options.target_completions,
            "max_new_tokens": options.max_new_tokens,
            "tokens": int(found.sums["tokens"]),
            "mean_length": found.sums["tokens"] / found.sums["completions"],
            **{name: found.sums[name] / found.sums["tokens"] for name in ("exact_kl", "k1", "k2", "k3")},
            **{name: found.sums[name] for name in ("lowest", "highest")},
            "off_policy": off_policy,
            "sampling": f"{source}, {policy}",
            "mse_batch": options.mse_batch,
            "seed": options.seed,
            "parameters": _parameters(pair, sketch),
        },
        "cost": {
            "seconds": round(found.seconds, 1),
            "tokens_through_both_models": found.forward_tokens,
            "peak_memory_mib": _peak_memory(),
            "device": str(pair.device),
            "dtype": options.dtype,
        },
        "left_out": left_out,
        **found.statistics(batch=options.mse_batch),
    }


def write_report(result: dict[str, Any], out: Path) -> list[Path]:
    """Write `audit.html` and `audit.json` into the folder `out`; returns their paths."""
    from kl_plugins.audit.pages import audit_page
    from kl_plugins.report import page

    made = {"command": page.command_line(), "versions": page.versions()}
    text = json.dumps(made | result, indent=1, allow_nan=False)
    return [page.write(out / "audit.json", text + "\n"), page.write(out / "audit.html", audit_page(result))]


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
    """MiB at the peak: of the GPU where one was used, else of the process."""
    torch = sys.modules["torch"]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated() >> 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


__all__ = ["AuditOptions", "run_audit", "write_report"]
