"""What a run of OpenRLHF is to do about its KL: the options, checked against the host's own flags."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from kl_plugins._version import __version__
from kl_plugins.core.controllers import ControllerSpec
from kl_plugins.core.spec import KLSpec
from kl_plugins.errors import ConfigError, PatchError
from kl_plugins.integration.leave_out import LeaveOut, resolve_leave_out
from kl_plugins.integration.options import OpenRLHFOptions, openrlhf_gamma
from kl_plugins.integration.problem import refuse_problems
from kl_plugins.integration.rules_openrlhf import FILTERED, openrlhf_problems

# Those after which the host centres the advantages and divides them by their deviation.
_NORMALIZING = ("gae", "reinforce", "reinforce_baseline")


@dataclass(frozen=True)
class RunPlan:
    """What every run has, also one whose KL stays OpenRLHF's own. It travels to every process as `args.kl_plugins`."""

    in_reward: bool
    """Whether the KL is a per-token reward (ours: `k1_in_reward` by default) instead of a term of the loss."""
    monitor: bool
    """Whether it is watched; see `monitor`."""
    version: str
    """The version of kl_plugins that made it."""


@dataclass(frozen=True)
class Plan(RunPlan):
    """The checked configuration of a run with a KL of ours."""

    spec: KLSpec
    discount: float
    """What one position is discounted with between a reward and the advantage that it reaches (gamma, for GAE gamma *
    lambda)."""
    normalized: bool
    """Whether OpenRLHF divides the advantages, with a KL in the reward in them, by their standard deviation."""
    group_size: int
    """Completions per prompt."""
    controller: ControllerSpec
    """Of beta; `fixed` leaves OpenRLHF's own in place."""
    left_out: LeaveOut
    """Tokens without a KL of their own."""
    leave_out_equal_rewards: bool
    """Whether groups of equal rewards have no KL."""
    picked: str
    """What `reverse_kl` picked, and why; empty if the configuration was named."""
    waived: tuple[str, ...]
    """What is wrong with the run, but was let through by `kl_allow_biased`."""

    @property
    def leaves_out(self) -> bool:
        """Whether anything may be left out of the KL."""
        return self.left_out != LeaveOut() or self.leave_out_equal_rewards


def check_options(options: OpenRLHFOptions) -> None:
    """Refuse options that are wrong whatever OpenRLHF's flags are. Neither OpenRLHF nor torch is needed for it.

    Raises:
        ConfigError: no KL was named, an option that can't be what was meant, a zero or biased gradient; all at once.
        UnknownLossError: nobody registered `options.kl`.
    """
    refuse_problems(openrlhf_problems(options, None), allow_biased=options.kl_allow_biased)


def plan_run(options: OpenRLHFOptions, args: Any) -> RunPlan:
    """Check `options` against OpenRLHF's parsed (hierarchical) `args`, and put the plan into them.

    With a KL (`options.kl`) it is a `Plan`, and OpenRLHF's KL flags are set to fit. Raises as `plan_kl` does.
    """
    args.kl_plugins = plan = _plan_watched(options, args) if options.kl is None else plan_kl(options, args)
    return plan


def plan_kl(options: OpenRLHFOptions, args: Any) -> Plan:
    """The plan of a run with the KL `options.kl`; `args` get OpenRLHF's KL flags that fit.

    Sets `algo.kl.use_loss`, and `algo.kl.estimator` to a name that OpenRLHF's own estimator refuses, so that a process
    that isn't hooked stops the run instead of training with another KL.

    Raises:
        ConfigError: an option or a flag that can't be what was meant, all of them at once.
        UnknownLossError: nobody registered `options.kl`.
    """
    problems = list(openrlhf_problems(options, args))
    refuse_problems(problems, allow_biased=options.kl_allow_biased)
    spec = options.kl_spec(args)
    assert spec is not None
    left_out = _left_out(options, args)
    _warn(args)
    advantage = args.algo.advantage
    lambd = advantage.lambd if advantage.estimator == "gae" else 1.0
    plan = Plan(
        spec=spec,
        in_reward=options.kl_in_reward,
        monitor=options.kl_monitor,
        discount=openrlhf_gamma(args) * lambd,
        normalized=advantage.estimator in _NORMALIZING and not advantage.no_std_norm,
        group_size=args.rollout.n_samples_per_prompt,
        controller=options.controller(float(args.algo.kl.init_coef)).spec,
        left_out=left_out,
        leave_out_equal_rewards=options.kl_leave_out_equal_rewards,
        picked=options.kl_choice(args).sentence,
        waived=tuple(problem.says for problem in problems),
        version=__version__,
    )
    args.algo.kl.use_loss = not plan.in_reward
    args.algo.kl.unbiased_gradient = False
    args.algo.kl.estimator = f"kl_plugins:{spec.name}"
    return plan


def _plan_watched(options: OpenRLHFOptions, args: Any) -> RunPlan:
    """The plan of a run whose KL stays OpenRLHF's own, as do its flags."""
    refuse_problems(openrlhf_problems(options, args), allow_biased=False)
    _warn(args)
    return RunPlan(in_reward=not args.algo.kl.use_loss, monitor=True, version=__version__)


def plan_of(args: Any) -> RunPlan:
    """The plan that came with a run's arguments. `PatchError` if none did: then the driver was never told."""
    plan = getattr(args, "kl_plugins", None)
    if plan is None:
        raise PatchError(
            "this process was hooked by kl_plugins, but the run's arguments hold no KL configuration: start OpenRLHF "
            "with `kl-plugins openrlhf`, or set RAY_RUNTIME_ENV_HOOK in the driver's environment: docs/openrlhf.md"
        )
    if plan.version != __version__:
        raise PatchError(
            f"the driver runs kl_plugins {plan.version}, this process {__version__}: install the same "
            "version on every node"
        )
    return plan  # type: ignore[no-any-return]


def _left_out(options: OpenRLHFOptions, args: Any) -> LeaveOut:
    """`kl_leave_out` in the tokens of the actor's tokenizer, which is only loaded if it is needed."""
    if not set(options.kl_leave_out) - {"first"}:
        return LeaveOut(first="first" in options.kl_leave_out)
    from transformers import AutoTokenizer, GenerationConfig

    path = args.actor.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"kl_leave_out={options.kl_leave_out}: the tokenizer of --actor.model_name_or_path {path} can't be loaded "
            f"here, in the driver ({error}); make it available, or leave kl_leave_out out"
        ) from error
    try:
        ends = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a model may come without one
        ends = None
    return resolve_leave_out(options.kl_leave_out, tokenizer=tokenizer, eos_token_id=ends)


def _warn(args: Any) -> None:
    if args.algo.dynamic_filtering_enable:
        warnings.warn(FILTERED, stacklevel=2)


__all__ = ["OpenRLHFOptions", "Plan", "RunPlan", "check_options", "plan_kl", "plan_of", "plan_run"]
