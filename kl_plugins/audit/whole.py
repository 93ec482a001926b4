"""The gradient that training takes, of reward and KL together: how far a batch is off, and which KL is best in it.

What a batch's whole gradient is off the gradient of E[R] - beta KL by has two parts: the bias of the KL term (the
reward's part is the same in every row), and the variance of the whole, to which reward and KL belong together. At the
optimum R - beta log(policy / reference) is the same number for every completion, so that a KL that gets the same
credit and baseline as the reward cancels the reward's noise, and one with less noise of its own doesn't.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kl_plugins.audit.collect import Collected
from kl_plugins.audit.configurations import Configuration
from kl_plugins.audit.objective import FEWEST_PROMPTS, SCALED_BY_DEFAULT, Objective
from kl_plugins.audit.statistics import interval, positive, signed_root, squared_norm, standard_error
from kl_plugins.core.registry import REVERSE_KL
from kl_plugins.integration.choice import choose

LEVEL = 0.99
"""Of the intervals that say better or worse: many configurations are compared at once."""
CONFIGS = {"grpo": "GRPOConfig", "rloo": "RLOOConfig"}


def whole_statistics(found: Collected, *, batch: int) -> dict[str, Any]:
    """Norm of the gradient of E[R] - beta KL, and for each configuration how far a batch of it is off, as plain data.

    `batch`: completions that the squared error is stated for. A row's `error`, `bias` (squared) and `variance` are
    relative to the gradient's squared norm; `ratio` is its error as a multiple of that of the configuration which
    `kl="reverse_kl"` picks, `verdict` what follows from it: `"better"`, `"tie"`, `"worse"`, or `"?"`.
    """
    objective = found.objective
    assert objective is not None
    off_policy = any(c.off_policy for c in found.configurations)
    picked = choose(REVERSE_KL, {}, host=objective.trainer, off_policy=off_policy)
    wanted = {"kl": picked.kl, **picked.options}
    wanted.pop("kl_clip")  # the rows have none, and nothing here is picked that has one
    pick = next(i for i, c in enumerate(found.all_configurations) if _asked(c) == wanted)
    gradient = _gradient(found, objective, pick=None if off_policy else pick)
    scale = positive(squared_norm(gradient))
    variances = found.whole.variance / (batch / objective.group_size)
    biases = torch.stack([_squared_bias(found, objective, c) for c in found.all_configurations], dim=1)
    errors = biases + variances[:, 1:]
    rows = []
    for index, configuration in enumerate(found.all_configurations):
        ratio = interval(errors[:, index] / positive(errors[:, pick]), LEVEL)
        rows.append(
            {
                "label": configuration.label,
                "picked": index == pick,
                "options": _options(configuration, objective),
                "gradient_of": configuration.gradient_of,
                "refused": configuration.refused,
                "bias": interval(biases[:, index] / scale),
                "variance": interval(variances[:, 1 + index] / scale),
                "error": interval(errors[:, index] / scale),
                "ratio": ratio,
                "verdict": "tie" if index == pick else _verdict(ratio, found.prompts),
            }
        )
    norm = interval(signed_root(squared_norm(gradient)))
    return {
        "trainer": objective.trainer,
        "beta": objective.beta,
        "scale_rewards": objective.scale_rewards,
        "num_generations": objective.group_size,
        "gradient": {
            "norm": norm,
            "standard_error": standard_error(gradient),
            "told_from_zero": (norm["low"] or 0.0) > 0,
        },
        "reward_alone": interval(variances[:, 0] / positive(errors[:, pick]), LEVEL),
        "rows": rows,
    }


def recommendation(whole: dict[str, Any] | None, *, trainer: str, beta: float, scale_rewards: str) -> dict[str, str]:
    """`line`, what to paste, and `why`, from `whole_statistics`; None: there were no rewards."""
    written = f'scale_rewards="{scale_rewards}", ' if scale_rewards != SCALED_BY_DEFAULT[trainer] else ""

    def line(*, kl: str = REVERSE_KL, beta: float = beta, **options: Any) -> str:
        asked = "".join(f", {name}={value!r}".replace("'", '"') for name, value in options.items())
        return f'{CONFIGS[trainer]}(..., {written}beta={beta:.4g}, kl="{kl}"{asked})'

    if whole is None:
        return {
            "line": line(),
            "why": "The whole gradient, of reward and KL, wasn't judged: give rewards with --reward-column (of saved "
            f"rollouts) or --reward (a function). {REVERSE_KL} is what to start from: it is unbiased, and treated as "
            "the reward is.",
        }
    rows = whole["rows"]
    (pick,) = [row for row in rows if row["picked"]]
    ours = [row for row in rows if row["options"] and not row["refused"] and not row["picked"]]
    better = sorted((row for row in ours if row["verdict"] == "better"), key=lambda row: row["ratio"]["value"])
    hosts = [row["label"] for row in rows if not row["options"] and row["verdict"] == "better"]
    theirs = f" Of the hosts' own terms {', '.join(hosts)} measured better than {REVERSE_KL}." if hosts else ""
    if better:
        alike = [row for row in better if row["ratio"]["low"] <= better[0]["ratio"]["high"]]
        unbiased = [row for row in alike if row["gradient_of"] == pick["gradient_of"]]
        best, bias = (unbiased or better)[0], ""
        ratio = best["ratio"]
        if best["gradient_of"] != pick["gradient_of"]:
            bias = f" It is the gradient of {best['gradient_of']}, though: that bias stays however large the batch."
        size = best["options"].get("num_generations")
        shrink = f" It isn't shrunk as GRPO's rewards are: its beta is {beta:g} x (1 - 1/{size})." if size else ""
        why = (
            f"{best['label']} measured {ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] of the squared "
            f"error that {REVERSE_KL} ({pick['label']}) has, for this policy: it is {REVERSE_KL} whose noise vanishes "
            f"with the reward's as training comes to its optimum, so audit again then.{bias}{shrink}{theirs}"
        )
        return {"line": line(**best["options"]), "why": why}
    if any(row["verdict"] == "?" for row in ours):
        why = f"These data can't tell the configurations apart; {REVERSE_KL} ({pick['label']}) is unbiased."
        return {"line": line(), "why": why + theirs}
    ties = [row["label"] for row in ours if row["verdict"] == "tie"]
    why = f"No configuration measured better than {REVERSE_KL} ({pick['label']})."
    if ties:
        why += f" It is a tie with {'; '.join(ties)}: then {REVERSE_KL} is recommended, because it is unbiased."
    return {"line": line(), "why": why + theirs}


def _gradient(found: Collected, objective: Objective, *, pick: int | None) -> Tensor:
    """(1 + R, K) of the loss -(E[R] - beta KL), with the least noise that there is.

    That is the reward's part and the target of the KL, or the whole with the picked configuration, whose noise is
    less where reward and KL cancel.
    """
    apart = found.whole.mean[:, 0] + objective.beta * found.targets.mean[:, 0]
    if pick is None:
        return apart
    return min(apart, found.whole.mean[:, 1 + pick], key=standard_error)


def _squared_bias(found: Collected, objective: Objective, configuration: Configuration) -> Tensor:
    """(1 + R,): the reward's part is the same whatever the KL is, so that the whole is off by beta times the KL."""
    labels = [c.label for c in found.configurations]
    index = labels.index(configuration.same_mean_as or configuration.label)
    apart = found.expected.mean[:, index] - found.targets.mean[:, 0]
    return objective.beta**2 * squared_norm(apart).clamp(min=0)


def _verdict(ratio: dict[str, float | None], prompts: int) -> str:
    low, high = ratio["low"], ratio["high"]
    if low is None or high is None or prompts < FEWEST_PROMPTS:
        return "?"
    return "better" if high < 1 else "worse" if low > 1 else "tie"


def _options(configuration: Configuration, objective: Objective) -> dict[str, Any]:
    """Options of the trainer that ask for it, those left out that it takes by itself; empty for a host's own term."""
    if configuration.origin != "kl_plugins.kl_terms":
        return {}
    asked = _asked(configuration)
    credit = {"kl_credit": configuration.credit}
    taken = choose(configuration.name, credit, host=objective.trainer).options | credit
    found = {name: value for name, value in asked.items() if name == "kl_credit" or value != taken.get(name, "")}
    beta = objective.beta_to_write(configuration.shrink(objective.group_size))
    if not math.isclose(beta, objective.beta):  # it depends on the size of the groups
        found["num_generations"] = objective.group_size
    return found | {"beta": beta}


def _asked(configuration: Configuration) -> dict[str, Any]:
    """The trainer's options as they would be written in full."""
    found: dict[str, Any] = {"kl": configuration.name, "kl_credit": configuration.credit}
    found["kl_baseline"] = configuration.baseline or None
    return found | ({"kl_off_policy": configuration.off_policy} if configuration.off_policy else {})


__all__ = ["recommendation", "whole_statistics"]
