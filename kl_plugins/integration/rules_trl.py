"""The rules about our options in TRL's trainers. `settings` is a config, or our options with the host's as attributes.

Each function yields all that is wrong with a configuration of one trainer. What only `biases` its gradient is let
through by `kl_allow_biased`; everything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from kl_plugins.integration.problem import Problem
from kl_plugins.integration.reward_scale import SCALES
from kl_plugins.integration.rules import (
    beta_problems,
    distribution_problems,
    placement_problems,
    reference_problems,
    spec_problems,
    unnamed_problems,
)
from kl_plugins.integration.sampling import sampling_problems
from kl_plugins.patching.versions import installed_version

SUGGESTED_BETA = {"grpo": 0.04, "gmpo": 0.04, "rloo": 0.05, "ppo": 0.05, "openrlhf": 0.01}


def grpo_problems(settings: Any, *, kl_in_liger_loss: bool | None = None) -> Iterator[Problem]:
    """What is wrong with a `GRPOConfig`.

    `kl_in_liger_loss` is whether TRL computes a loss with its own KL under `use_liger_kernel`; None: as far as the
    installed version tells, for `explain`, which doesn't import TRL.
    """
    if settings.kl is None:
        yield from unnamed_problems(settings)
        return
    yield from _online_problems(settings, suggested=SUGGESTED_BETA["grpo"])
    yield from _scale_problems(settings, "scale_rewards")
    aggregation = getattr(settings, "multi_objective_aggregation", "sum_then_normalize")  # not in every TRL
    if settings.kl_scale == "reward" and aggregation != "sum_then_normalize":
        yield Problem(
            f"kl_scale='reward' with multi_objective_aggregation={aggregation!r}, which divides each reward by "
            "another standard deviation: there is none for the KL; leave kl_scale out",
            {"kl_scale": None},
        )
    if kl_in_liger_loss is None:
        kl_in_liger_loss = older_than(installed_version("trl"), 1, 14)
    if settings.use_liger_kernel and kl_in_liger_loss:
        yield Problem(
            "use_liger_kernel=True: this TRL then computes its loss with its own KL in it; leave it out",
            {"use_liger_kernel": None},
        )
    if not settings.use_bias_correction_kl:
        yield Problem(
            "use_bias_correction_kl=False is about TRL's own KL, which kl replaces: use kl_off_policy",
            {"use_bias_correction_kl": None},
        )
    if settings.kl_clip == "combined":
        for name, neutral in (("off_policy_mask_threshold", None), ("top_entropy_quantile", 1.0)):
            if getattr(settings, name) != neutral:
                yield Problem(
                    f"{name}={getattr(settings, name)!r} masks tokens of the policy loss, and with "
                    "kl_clip='combined' their KL with them: use kl_clip='separate' or None",
                    {"kl_clip": None},
                )
        credit = settings.kl_choice().options["kl_credit"]
        apart = credit != "sequence" or set(settings.kl_leave_out) - {"first"}
        if settings.importance_sampling_level == "sequence" and apart:
            yield Problem(
                f"kl_clip='combined' with importance_sampling_level='sequence', kl_credit={credit!r} and kl_leave_out="
                f"{settings.kl_leave_out}: TRL's ratio of whole completions averages the advantages of their tokens, "
                "and with them coefficients that differ; use kl_clip='separate' or None",
                {"kl_clip": None},
            )


def gmpo_problems(settings: Any, *, kl_in_liger_loss: bool | None = None) -> Iterator[Problem]:
    """What is wrong with a `GMPOConfig`; `kl_in_liger_loss` is that of `grpo_problems`."""
    yield from grpo_problems(settings, kl_in_liger_loss=kl_in_liger_loss)
    yield from gmpo_clip_problems(settings)


def gmpo_clip_problems(settings: Any) -> Iterator[Problem]:
    """What is wrong with any config in a `GMPOTrainer`."""
    if settings.kl is None:
        return
    if settings.kl_clip == "combined":
        yield Problem(
            "kl_clip='combined': GMPO's advantage is one number a sequence; use kl_clip='separate' or None",
            {"kl_clip": None},
        )
    elif settings.kl_options()["kl_clip"] == "combined":
        yield Problem(
            f"kl={settings.kl!r} in a GRPOConfig picked kl_clip='combined', but GMPO's advantage is one number a "
            "sequence: use GMPOConfig, or kl='k1_in_reward', which picks no clip",
            {"kl": "k1_in_reward"},
        )


def rloo_problems(settings: Any) -> Iterator[Problem]:
    """What is wrong with an `RLOOConfig`."""
    if settings.kl is None:
        yield from unnamed_problems(settings)
        return
    yield from _online_problems(settings, suggested=SUGGESTED_BETA["rloo"])
    yield from _scale_problems(settings, "normalize_advantages")
    credit = settings.kl_choice().options["kl_credit"]
    if settings.kl_clip == "combined" and credit != "sequence":
        yield Problem(
            f"kl_clip='combined' with kl_credit={credit!r}: RLOO's advantage is one number a sequence; "
            "use kl_credit='sequence', or kl_clip='separate'",
            {"kl_credit": "sequence"} if "sequence" in settings.kl_loss.gradient_of else {"kl_clip": None},
        )
    if settings.kl_clip == "combined" and set(settings.kl_leave_out) - {"first"}:
        yield Problem(
            f"kl_clip='combined' with kl_leave_out={settings.kl_leave_out}: RLOO's advantage is one number a "
            "sequence, but a left-out token has a coefficient of its own; use kl_clip='separate' or None",
            {"kl_clip": None},
        )


def _scale_problems(settings: Any, option: str) -> Iterator[Problem]:
    """What is wrong with `kl_scale` in a trainer that divides rewards if TRL's `option` says so."""
    if settings.kl_scale not in SCALES:
        yield Problem(
            f"kl_scale={settings.kl_scale!r}: choose from {', '.join(map(repr, SCALES))}", {"kl_scale": None}
        )
    elif settings.kl_scale == "reward" and getattr(settings, option) in (False, "none"):
        yield Problem(
            f"kl_scale='reward' with {option}={getattr(settings, option)!r}: nothing divides the rewards, and so "
            "there is nothing to divide the KL by; leave it out",
            {"kl_scale": None},
        )


def _online_problems(settings: Any, *, suggested: float) -> Iterator[Problem]:
    """What GRPO, GMPO and RLOO share."""
    yield from spec_problems(settings)
    yield from beta_problems(settings, "beta", settings.beta, suggested=suggested)
    if settings.kl_clip == "combined":
        for name in ("kl_clip_epsilon", "kl_weight_clip", "kl_weight_clip_mode"):
            if name in settings.changed_kl_options():
                yield Problem(
                    f"{name}={getattr(settings, name)!r} is not used with kl_clip='combined', where TRL's own ratio "
                    "and epsilon apply to the KL: leave it out",
                    {name: None},
                )
    yield from reference_problems(settings)
    moves = [name for name in settings.changed_kl_options() if name.startswith("kl_reference")]
    if settings.sync_ref_model and moves:
        yield Problem(
            "sync_ref_model=True moves TRL's own reference: use kl_reference_every and kl_reference_decay",
            {"sync_ref_model": None},
        )
    moving = "sync_ref_model" if settings.sync_ref_model else "kl_reference_every"
    if settings.kl_loss.exact and (settings.sync_ref_model or settings.kl_reference_every is not None):
        yield Problem(
            f"{moving}={getattr(settings, moving)} changes the reference between a rollout and its use, but "
            f"kl={settings.kl!r} keeps its hidden states from the rollout: leave it out, or use k1_in_reward or "
            "k2_as_loss",
            {moving: None},
        )
    yield from sampling_problems(settings)


def ppo_problems(settings: Any) -> Iterator[Problem]:
    """What is wrong with a `PPOConfig`."""
    if settings.kl is None:
        yield from unnamed_problems(settings)
        return
    if settings.kl_loss.exact:
        yield from distribution_problems(settings, "TRL's PPOTrainer")
        return
    yield from spec_problems(settings, discount="gamma" if settings.kl_in_reward else "")
    yield from placement_problems(settings, host="PPO", applies="TRL's own gamma, lam, ratio and cliprange")
    if settings.kl_in_reward and settings.whiten_rewards:
        yield Problem(
            "whiten_rewards=True divides the KL in the reward by the rewards' standard deviation and adds a constant "
            "to every token, which rewards length: leave it out, or use kl_placement='loss'",
            {"whiten_rewards": None},
        )
    yield from beta_problems(settings, "kl_coef", settings.kl_coef, suggested=SUGGESTED_BETA["ppo"])
    if settings.kl_estimator != "k1":
        yield Problem(
            f"kl_estimator={settings.kl_estimator!r} names TRL's own KL, which kl={settings.kl!r} replaces: leave it "
            "out",
            {"kl_estimator": None},
        )
    if settings.kl_leave_out_equal_rewards:
        yield Problem(
            "kl_leave_out_equal_rewards needs several completions of a prompt: leave it out, PPO generates one",
            {"kl_leave_out_equal_rewards": None},
        )
    if settings.kl_baseline not in (None, "auto"):
        yield Problem(
            f"kl_baseline={settings.kl_baseline!r} needs several completions of a prompt, but PPO generates one, and "
            "its critic is the baseline: leave it out",
            {"kl_baseline": None},
        )


def length_problems(trainer: str, loss_type: str | None = None) -> Iterator[Problem]:
    """Where a trainer divides each completion's KL by its own length: trained all the same, with a warning."""
    biases = "divides the KL of each completion by its own length, which biases any KL's gradient where lengths vary"
    if trainer == "gmpo":
        yield Problem(
            f"GMPO {biases}: use GRPO with importance_sampling_level='sequence' and loss_type='dapo' or 'dr_grpo'",
            {"kl": ""},
            biases=True,
        )
    elif loss_type in ("grpo", "sapo"):
        yield Problem(
            f"loss_type={loss_type!r} {biases}: use 'dapo' (by the batch's tokens) or 'dr_grpo' (by a constant)",
            {"loss_type": "dapo"},
            biases=True,
        )


def older_than(installed: str | None, *version: int) -> bool:
    """Whether the installed version of a host is older than a major and minor one; False if none is installed."""
    return installed is not None and tuple(map(int, re.findall(r"\d+", installed)[:2])) < version


RULES: dict[str, Callable[[Any], Iterator[Problem]]] = {
    "grpo": grpo_problems,
    "gmpo": gmpo_problems,
    "rloo": rloo_problems,
    "ppo": ppo_problems,
}
