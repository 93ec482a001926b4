"""The audit: measures bias and variance of every KL term's gradient on a model, its reference and prompts."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kl_plugins.audit.data import Prompt, Rollouts, read_prompts, read_rollouts
from kl_plugins.audit.objective import FEWEST_PROMPTS, SCALED_BY_DEFAULT, SCALES, TRAINERS, Objective
from kl_plugins.errors import ConfigError, refuse

if TYPE_CHECKING:
    from kl_plugins.audit.collect import Collected
    from kl_plugins.audit.model import Pair
    from kl_plugins.audit.sketch import Sketch

FEW = 64
POLICY_IS_REFERENCE = (
    "The policy is the reference: every sampled token is as likely under both, the KL is 0, and no term has a "
    "gradient of it to measure. Audit again once training has moved the policy, or name the model that it started "
    "from with --reference."
)
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
    reward: str = ""
    """A reward function, `package.module:function` or `file.py:function`: the whole gradient is judged, too."""
    reward_column: str = ""
    """Instead of `reward`: the column of `rollouts` that holds rewards."""
    beta: float = 0.04
    """What a nat of KL costs in the whole gradient; GRPO's paper has 0.04 (Shao et al., arXiv 2402.03300)."""
    trainer: str = "grpo"
    """`"grpo"` or `"rloo"`: what is subtracted from rewards, and what is recommended."""
    num_generations: int | None = None
    """Completions that are baselined together; None: half of each prompt's, since two groups are needed."""
    scale_rewards: str | None = None
    """`"none"` or `"group"`, as in TRL; None: the trainer's default there."""

    @property
    def judges_whole(self) -> bool:
        """Whether there are rewards."""
        return bool(self.reward or self.reward_column)

    @property
    def scale(self) -> str:
        """`scale_rewards`, resolved: TRL's `GRPOTrainer` scales by group, its `RLOOTrainer` doesn't."""
        return self.scale_rewards or SCALED_BY_DEFAULT.get(self.trainer, "none")

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
        for name, low in (least | {"mse_batch": 1, "num_generations": 2}).items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                problems.append(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {low}")
        if self.dtype not in DTYPES:
            problems.append(f"--dtype {self.dtype}: choose from {', '.join(DTYPES)}")
        refuse([*problems, *self._problems_of_rewards()])

    def _problems_of_rewards(self) -> list[str]:
        problems = []
        if self.reward and self.reward_column:
            problems.append("both of --reward and --reward-column were given: give one of them")
        if self.reward_column and self.rollouts is None:
            problems.append(
                f"--reward-column {self.reward_column}: only saved rollouts have rewards already; give --rollouts, or "
                "a function with --reward"
            )
        if not (0 < self.beta < math.inf):
            problems.append(f"--beta {self.beta}: a positive number")
        for name, value, offered in (
            ("--trainer", self.trainer, TRAINERS),
            ("--scale-rewards", self.scale, SCALES),
        ):
            if value not in offered:
                problems.append(f"{name} {value}: choose from {', '.join(offered)}")
        if self.trainer == "rloo" and self.scale == "group":
            problems.append("--scale-rewards group is GRPO's, but --trainer rloo was given: leave one of them out")
        return problems


def run_audit(
    options: AuditOptions, *, say: Callable[[str], None], done: Callable[[int, int], None]
) -> dict[str, Any]:
    """Measure; returns what `audit.json` holds. `say` is called with each step, `done` with prompts done and asked.

    Raises `ConfigError` for bad input, `ValueError` for log-probs that aren't finite, and `KeyboardInterrupt` if there
    was an interruption before a prompt was done.
    """
    units: list[Any]
    seen: dict[str, int] = {"limit": options.max_prompts, "seed": options.seed}
    if options.rollouts is not None:
        units = list(
            read_rollouts(options.rollouts, options.prompt_column, reward_column=options.reward_column, **seen)
        )
    else:
        units = list(read_prompts(options.prompts or Path(), options.prompt_column, **seen))
    objective = _objective(options, units) if options.judges_whole else None
    say("Loading the models" + " and the hosts" * options.hosts)
    import torch

    from kl_plugins.audit.collect import collect
    from kl_plugins.audit.configurations import (
        grouped_configurations,
        host_configurations,
        own_configurations,
    )
    from kl_plugins.audit.engine import vllm_rollouts
    from kl_plugins.audit.model import Pair
    from kl_plugins.audit.rewards import load_reward, rewards_of
    from kl_plugins.audit.sketch import Sketch
    from kl_plugins.audit.whole import recommendation, whole_statistics

    function = load_reward(options.reward) if options.reward else None
    torch.manual_seed(options.seed)
    pair = Pair(options.model, options.reference, device=options.device, dtype=options.dtype)
    if options.vllm:
        say("Drawing completions with vLLM")
        ids = [pair.prompt_ids(unit.prompt) for unit in units]
        drawn = vllm_rollouts(
            options.model,
            ids,
            completions=options.completions,
            max_new_tokens=min(pair.room(prompt, options.max_new_tokens) for prompt in ids),
            ends=pair.ends,
            seed=options.seed,
            dtype=options.dtype,
        )
        units = [
            replace(rollouts, prompt=unit.prompt, columns=[unit.columns] * options.completions)
            for unit, rollouts in zip(units, drawn, strict=True)
        ]
    off_policy = isinstance(units[0], Rollouts) and units[0].behavior_logp is not None
    # A host's grouped term has no weights: off-policy its baseline would change the expected gradient.
    grouped = objective is not None and not off_policy
    no_hosts = ["hosts: --no-hosts was given"]
    theirs, left_out = host_configurations(grouped=grouped) if options.hosts else ([], no_hosts)
    configurations = [*own_configurations(off_policy=off_policy), *theirs]
    if objective is not None:
        configurations += grouped_configurations(objective.baseline, off_policy=off_policy)
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
        objective=objective,
        rewards=rewards_of(function, f"--reward {options.reward}", pair.texts) if function else _saved,
        seed=options.seed,
        done=lambda count: done(count, len(units)),
    )
    if not found.prompts:
        raise KeyboardInterrupt
    source = "drawn with vLLM" if options.vllm else "as saved" if options.rollouts else "drawn from the policy"
    policy = "weighed against their behavior_logp" if off_policy else "on-policy"
    whole = whole_statistics(found, batch=options.mse_batch) if objective is not None else None
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
            "policy_is_reference": found.policy_is_reference,
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
        "whole": whole,
        "recommended": recommendation(whole, trainer=options.trainer, beta=options.beta, scale_rewards=options.scale),
    }


def _objective(options: AuditOptions, units: Sequence[Prompt | Rollouts]) -> Objective:
    """What the rewards make of it. Raises `ConfigError` for prompts that have fewer completions than two groups."""
    counts = [len(unit.completions) if isinstance(unit, Rollouts) else options.completions for unit in units]
    size, fewest = options.num_generations or min(counts) // 2, min(counts)
    if size < 2 or fewest < 2 * size:
        raise ConfigError(
            f"the whole gradient needs two groups of {max(size, 2)} completions of each prompt, found {fewest} "
            "completions of one: give more"
            + (" or a smaller --num-generations" if options.num_generations else " (--completions)")
        )
    return Objective(trainer=options.trainer, beta=options.beta, scale_rewards=options.scale, group_size=size)


def _saved(rollouts: Rollouts) -> list[float]:
    assert rollouts.rewards is not None
    return rollouts.rewards


def write_report(result: dict[str, Any], out: Path) -> list[Path]:
    """Write `audit.html` and `audit.json` into the folder `out`; returns their paths."""
    from kl_plugins.audit.pages import audit_page
    from kl_plugins.report import page

    made = {"command": page.command_line(), "versions": page.versions()}
    text = json.dumps(made | result, indent=1, allow_nan=False)
    return [page.write(out / "audit.json", text + "\n"), page.write(out / "audit.html", audit_page(result))]


def _notices(found: Collected, shortest: int | None) -> list[str]:
    notices = []
    if found.policy_is_reference:
        notices.append(POLICY_IS_REFERENCE)
    if shortest is not None:
        notices.append(f"The model has positions for {shortest} new tokens after the longest prompt, not for more.")
    if not found.complete:
        notices.append(
            f"Partial: interrupted after {found.prompts} of {found.asked} prompts. What follows is about those."
        )
    if found.objective is not None and found.prompts < FEWEST_PROMPTS:
        notices.append(
            f"Only {found.prompts} prompts: the intervals of the whole gradient come from resampling prompts, and say "
            f"nothing below {FEWEST_PROMPTS}."
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
