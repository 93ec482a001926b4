"""The rules about our options in OpenRLHF, under its own flags. `args` are those flags, parsed (hierarchical).

A problem with `biases` is let through by `kl_allow_biased`; everything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from kl_plugins.integration.choice import GROUP_ESTIMATORS
from kl_plugins.integration.options import OpenRLHFOptions, openrlhf_gamma
from kl_plugins.integration.problem import Problem
from kl_plugins.integration.rules import controller_problems, distribution_problems, placement_problems, spec_problems

FILTERED = "--algo.dynamic_filtering_enable drops prompts by their rewards: the KL is that of the prompts that remain"


def openrlhf_problems(options: OpenRLHFOptions, args: Any) -> Iterator[Problem]:
    """What is wrong with a run of OpenRLHF under our launcher; with `args` None: whatever its flags are."""
    if options.kl is None:
        yield from _watched_problems(options, args)
        return
    if options.kl_loss.exact:
        yield from distribution_problems(options, "OpenRLHF's actor")
        return
    yield from placement_problems(
        options,
        host="OpenRLHF",
        applies="OpenRLHF's own discount, ratio, clip and is_correction",
        credits=("to_go", "sequence"),
    )
    yield from spec_problems(options, args, discount="algo.advantage.gamma" if options.kl_in_reward else "")
    if args is not None:
        yield from _flag_problems(options, args)
        yield from sampler_problems(args)
        yield from reward_length_problems(args, options.kl_in_reward)


def _watched_problems(options: OpenRLHFOptions, args: Any) -> Iterator[Problem]:
    """What is wrong with options that name no KL."""
    changed = options.changed_kl_options()
    if not options.kl_monitor:
        yield Problem(
            "no KL was named: give one, e.g. --kl reverse_kl, or --kl-monitor to watch OpenRLHF's own, or start "
            "OpenRLHF itself",
            dict.fromkeys(changed),
        )
        return
    for name in changed:
        if name != "kl_monitor":
            yield Problem(
                f"{name}={getattr(options, name)!r}, but no KL was named, and kl_monitor leaves OpenRLHF's own as it "
                "is: name one, e.g. --kl reverse_kl, or leave the option out",
                {name: None},
            )
    if args is not None and not args.algo.kl.init_coef > 0:
        yield Problem(
            f"--algo.kl.init_coef {args.algo.kl.init_coef} with kl_monitor: OpenRLHF loads no reference then, and "
            "there is no KL to watch; with --algo.kl.init_coef 1e-30 it is loaded and scored, and the KL that this "
            "adds is too small to change anything",
            {"algo.kl.init_coef": 1e-30},
        )


def _flag_problems(options: OpenRLHFOptions, args: Any) -> Iterator[Problem]:
    kl, advantage, samples = args.algo.kl, args.algo.advantage, args.rollout.n_samples_per_prompt
    in_reward = options.kl_in_reward
    if not 0 < kl.init_coef < math.inf:
        yield Problem(
            f"--algo.kl.init_coef {kl.init_coef}: it is beta; with kl={options.kl} it must be positive",
            {"algo.kl.init_coef": 0.01},
        )
    else:
        yield from controller_problems(options, kl.init_coef)
    if kl.target is not None and options.kl_controller != "fixed":
        yield Problem(
            f"--algo.kl.target with kl_controller={options.kl_controller!r}: keep one of the two",
            {"algo.kl.target": None},
        )
    if kl.unbiased_gradient and options.kl_loss.name != "k2_as_loss":  # whose gradient that is
        yield Problem(
            "--algo.kl.unbiased_gradient is about OpenRLHF's own KL, which kl replaces: leave it out",
            {"algo.kl.unbiased_gradient": None},
        )
    if kl.estimator not in ("k1", options.kl_loss.name[:2]):  # its default, and what a launch script may have
        yield Problem(
            f"--algo.kl.estimator {kl.estimator} names OpenRLHF's own KL, which kl replaces: leave it out",
            {"algo.kl.estimator": None},
        )
    if kl.use_loss and in_reward:
        yield Problem(
            f"--algo.kl.use_loss with {options.kl}, which goes into the reward: leave it out",
            {"algo.kl.use_loss": None},
        )
    if kl.target is not None and not in_reward:
        yield Problem(
            "--algo.kl.target adapts beta to the KL that OpenRLHF logs, which is wrong for a KL in the loss (it is "
            "weighted by tokens twice): use --kl-controller proportional --kl-target ... instead",
            {"algo.kl.target": None},
        )
    if options.kl_baseline in ("leave_one_out", "group_mean") and samples < 2:
        yield Problem(
            f"kl_baseline={options.kl_baseline!r} needs --rollout.n_samples_per_prompt of 2 or more",
            {"kl_baseline": None},
        )
    gamma = openrlhf_gamma(args)
    if options.kl_baseline in ("leave_one_out", "group_mean") and in_reward and gamma != 1:
        yield Problem(
            f"kl_baseline={options.kl_baseline!r} with --algo.advantage.gamma {gamma}: only undiscounted returns hand "
            "a baseline in the reward to the tokens as it is; leave it out, or use a gamma of 1",
            {"kl_baseline": None},
        )
    if options.kl_baseline in ("leave_one_out", "group_mean") and advantage.estimator == "gae" and in_reward:
        yield Problem(
            f"kl_baseline={options.kl_baseline!r} with gae, whose critic is the baseline already: leave it out",
            {"kl_baseline": None},
        )
    gamma, with_critic = openrlhf_gamma(args), advantage.estimator == "gae"
    if options.kl_credit == "sequence" and in_reward and (with_critic or gamma != 1):
        yield Problem(
            f"kl_credit='sequence' in the reward with --algo.advantage.estimator {advantage.estimator} and gamma "
            f"{gamma:g}: the sum stands at the last token, and only undiscounted returns without a critic hand it to "
            "all tokens alike; leave kl_credit out (with gae), or use --algo.advantage.gamma 1",
            ({"kl_credit": None} if with_critic else {}) | ({"algo.advantage.gamma": 1.0} if gamma != 1 else {}),
        )
    if options.kl_leave_out_equal_rewards and samples < 2:
        yield Problem(
            "kl_leave_out_equal_rewards needs --rollout.n_samples_per_prompt of 2 or more",
            {"kl_leave_out_equal_rewards": None},
        )
    if options.kl_leave_out_equal_rewards and advantage.estimator not in GROUP_ESTIMATORS:
        yield Problem(
            f"kl_leave_out_equal_rewards with --algo.advantage.estimator {advantage.estimator}, where groups of equal "
            f"rewards have advantages, too: use one of {', '.join(GROUP_ESTIMATORS)}, or leave it out",
            {"kl_leave_out_equal_rewards": None},
        )
    if in_reward and args.actor.policy_loss_type == "gspo":
        yield Problem(
            "--actor.policy_loss_type gspo gives every token the mean advantage of its sequence, and with it the mean "
            "of the KL coefficients: use kl_placement='loss'",
            {"kl_placement": "loss"},
        )


def sampler_problems(args: Any) -> Iterator[Problem]:
    """Where the samples aren't from the policy that is said to have drawn them, for any KL, OpenRLHF's own as well."""
    if args.rollout.top_p != 1:
        yield Problem(
            f"--rollout.top_p {args.rollout.top_p} draws tokens from another distribution than the one whose "
            "log-probs are taken, which biases every sampled KL: use 1.0",
            {"rollout.top_p": 1.0},
            biases=True,
        )
    if args.train.async_enable and args.algo.advantage.is_correction_level == "off":
        yield Problem(
            "--train.async_enable trains on stale samples, but without vLLM's own log-probs nobody knows how stale: "
            "add --algo.advantage.is_correction_level token",
            {"algo.advantage.is_correction_level": "token"},
            biases=True,
        )


def reward_length_problems(args: Any, in_reward: bool) -> Iterator[Problem]:
    """Where a KL in the reward, OpenRLHF's own as well, is divided by each completion's length."""
    if in_reward and args.actor.loss_agg_mode != "token-mean":
        yield Problem(
            f"--actor.loss_agg_mode {args.actor.loss_agg_mode} divides the KL in the reward of each completion by its "
            "length, which biases its gradient: use token-mean, or a KL in the loss",
            {"actor.loss_agg_mode": "token-mean"},
            biases=True,
        )
