"""What a run of OpenRLHF is to do about its KL: the options, checked against the host's own flags."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any

from kl_plugins._version import __version__
from kl_plugins.core.controllers import ControllerSpec
from kl_plugins.core.registry import distribution_problems, get_loss
from kl_plugins.core.spec import KLSpec
from kl_plugins.errors import ConfigError, PatchError, refuse
from kl_plugins.integration.leave_out import LeaveOut, resolve_leave_out
from kl_plugins.integration.options import LEAVE_OUT_OPTIONS, KLOptions, option

PLACEMENTS = ("auto", "loss", "reward")
# Those that give each prompt a group of completions, whose other members can be a baseline.
GROUP_ESTIMATORS = ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")
# Those that let the host discount: the others set gamma to 1 themselves.
_DISCOUNTING = ("gae", "reinforce")
# Those after which the host centres the advantages and divides them by their deviation.
_NORMALIZING = ("gae", "reinforce", "reinforce_baseline")


@dataclass
class OpenRLHFOptions(KLOptions):
    """The options of `KLSpec`, and where the term goes. `--algo.kl.init_coef` stays the coefficient (beta)."""

    kl: str | None = option(None, "KL configuration, e.g. k2_as_loss; `kl-plugins explain` lists them.")
    kl_clip: str | None = option(None, "PPO's clip on a KL in the loss: separate, or none.")
    kl_placement: str = option(
        "auto",
        "loss, reward (through OpenRLHF's returns and critic), or auto: reward for in-reward configurations.",
    )
    kl_baseline: str | None = option(
        "auto", "leave_one_out, none, or auto: leave_one_out for the in-reward configurations of group estimators."
    )
    kl_monitor: bool = option(
        False, "Log what the KL does (docs/monitoring.md): that of --kl or, without it, OpenRLHF's own."
    )

    def __post_init__(self) -> None:
        self._none_from_words()


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
    if options.kl is None:
        refuse(_watched_problems(options))
        return
    loss = get_loss(options.kl)
    in_reward = options.kl_placement == "reward" or (options.kl_placement == "auto" and loss.in_reward)
    refuse(distribution_problems(loss.name, "OpenRLHF's actor"))
    problems = _placement_problems(options, loss.in_reward, in_reward)
    try:
        problems += options.left_out_problems(_spec(options, None, in_reward))
    except ConfigError as error:
        problems += error.args
    refuse(problems)


def plan_run(options: OpenRLHFOptions, args: Any) -> RunPlan:
    """Check `options` against OpenRLHF's parsed (hierarchical) `args`, and put the plan into them.

    With a KL (`options.kl`) it is a `Plan`, and OpenRLHF's KL flags are set to fit. Raises as `plan_kl` does.
    """
    args.kl_plugins = plan = _plan_watched(options, args) if options.kl is None else plan_kl(options, args)
    return plan


def plan_kl(options: OpenRLHFOptions, args: Any, *, resolve_tokens: bool = True) -> Plan:
    """The plan of a run with the KL `options.kl`; `args` get OpenRLHF's KL flags that fit.

    Sets `algo.kl.use_loss`, and `algo.kl.estimator` to a name that OpenRLHF's own estimator refuses, so that a process
    that isn't hooked stops the run instead of training with another KL. `resolve_tokens=False` loads no tokenizer, to
    explain a run that isn't started.

    Raises:
        ConfigError: an option or a flag that can't be what was meant, all of them at once.
        UnknownLossError: nobody registered `options.kl`.
    """
    loss = get_loss(str(options.kl))
    in_reward = options.kl_placement == "reward" or (options.kl_placement == "auto" and loss.in_reward)
    refuse(distribution_problems(loss.name, "OpenRLHF's actor"))
    problems = _placement_problems(options, loss.in_reward, in_reward)
    spec = None
    try:
        spec = _spec(options, args, in_reward)
    except ConfigError as error:
        problems += error.args
    else:
        problems += options.left_out_problems(spec)
    biased = _bias_problems(args, in_reward)
    refuse([*problems, *_flag_problems(options, args, in_reward), *(() if options.kl_allow_biased else biased)])
    assert spec is not None
    left = _left_out(options, args) if resolve_tokens else LeaveOut()
    _warn(args)
    advantage = args.algo.advantage
    lambd = advantage.lambd if advantage.estimator == "gae" else 1.0
    plan = Plan(
        spec=spec,
        in_reward=in_reward,
        monitor=options.kl_monitor,
        discount=_gamma(args) * lambd,
        normalized=advantage.estimator in _NORMALIZING and not advantage.no_std_norm,
        group_size=args.rollout.n_samples_per_prompt,
        controller=options.controller(float(args.algo.kl.init_coef)).spec,
        left_out=left,
        leave_out_equal_rewards=options.kl_leave_out_equal_rewards,
        waived=tuple(biased),
        version=__version__,
    )
    args.algo.kl.use_loss = not in_reward
    args.algo.kl.unbiased_gradient = False
    args.algo.kl.estimator = f"kl_plugins:{options.kl}"
    return plan


def _plan_watched(options: OpenRLHFOptions, args: Any) -> RunPlan:
    """The plan of a run whose KL stays OpenRLHF's own, as do its flags."""
    problems = _watched_problems(options)
    if options.kl_monitor and not args.algo.kl.init_coef > 0:
        problems.append(
            f"--algo.kl.init_coef {args.algo.kl.init_coef} with kl_monitor: OpenRLHF loads no reference then, and "
            "there is no KL to watch; with --algo.kl.init_coef 1e-30 it is loaded and scored, and the KL that this "
            "adds is too small to change anything"
        )
    refuse(problems)
    _warn(args)
    return RunPlan(in_reward=not args.algo.kl.use_loss, monitor=True, version=__version__)


def _watched_problems(options: OpenRLHFOptions) -> list[str]:
    """What is wrong with options without a KL."""
    if not options.kl_monitor:
        return [
            "no KL was named: give one, e.g. --kl k2_as_loss, or --kl-monitor to watch OpenRLHF's own, or start "
            "OpenRLHF itself"
        ]
    defaults = {f.name: f.metadata["default"] for f in fields(options)} | {"kl_monitor": True}
    return [
        f"{name}={getattr(options, name)!r}, but no KL was named, and kl_monitor leaves OpenRLHF's own as it is: "
        "name one, e.g. --kl k2_as_loss, or leave the option out"
        for name, default in defaults.items()
        if getattr(options, name) != default
    ]


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


def _gamma(args: Any) -> float:
    advantage = args.algo.advantage
    return float(advantage.gamma) if advantage.estimator in _DISCOUNTING else 1.0


def _spec(options: OpenRLHFOptions, args: Any, in_reward: bool) -> KLSpec:
    """The spec of the options under the host's flags `args`; None are flags at which no option of ours depends."""
    chosen = OpenRLHFOptions(**vars(options))
    if chosen.kl_baseline == "auto":
        groups = (
            args is not None
            and args.algo.advantage.estimator in GROUP_ESTIMATORS
            and args.rollout.n_samples_per_prompt > 1
        )
        chosen.kl_baseline = "leave_one_out" if groups and get_loss(str(chosen.kl)).in_reward else None
    if in_reward:
        chosen.kl_clip = "combined"
        if chosen.kl_credit in (None, "to_go"):
            chosen.kl_gamma = 1.0 if args is None else _gamma(args)
    try:
        spec = chosen.kl_spec()
    except ConfigError as error:
        if not in_reward:
            raise
        raise ConfigError(*(each.replace("kl_gamma=", "--algo.advantage.gamma ") for each in error.args)) from None
    assert spec is not None
    return spec


def _placement_problems(options: OpenRLHFOptions, loss_in_reward: bool, in_reward: bool) -> list[str]:
    if options.kl_placement not in PLACEMENTS:
        return [f"kl_placement={options.kl_placement!r}: choose from {', '.join(PLACEMENTS)}"]
    if not in_reward:
        if options.kl_clip == "combined":
            return ["kl_clip='combined' puts the KL into the advantage: use kl_placement='reward' instead"]
        return []
    problems = []
    if not loss_in_reward:
        problems.append(f"{options.kl} is a term of the loss: leave kl_placement out, or use kl='k1_in_reward'")
    if options.kl_credit not in (None, "to_go"):
        problems.append(
            f"kl_credit={options.kl_credit!r}: OpenRLHF sums rewards from a token on, which is credit 'to_go'; use "
            "kl_placement='loss' for others"
        )
    unused = {"kl_gamma", "kl_off_policy", "kl_weight_clip", "kl_weight_clip_mode", "kl_clip", "kl_clip_epsilon"}
    problems += [
        f"{name}={getattr(options, name)!r} is not used in the reward, where OpenRLHF's own discount, ratio, clip and "
        "is_correction apply to the KL: leave it out, or use kl_placement='loss'"
        for name in options.changed_kl_options()
        if name in unused
    ]
    problems += [
        f"{name}={getattr(options, name)!r}: in the reward OpenRLHF's returns would charge a left-out token with what "
        "only those before it owe; use kl_placement='loss'"
        for name in options.changed_kl_options()
        if name in LEAVE_OUT_OPTIONS
    ]
    return problems


def _flag_problems(options: OpenRLHFOptions, args: Any, in_reward: bool) -> list[str]:
    kl, advantage, problems = args.algo.kl, args.algo.advantage, []
    if not 0 < kl.init_coef < math.inf:
        problems.append(f"--algo.kl.init_coef {kl.init_coef}: it is beta; with kl={options.kl} it must be positive")
    else:
        problems += options.controller_problems(float(kl.init_coef))
    if kl.target is not None and options.kl_controller != "fixed":
        problems.append(f"--algo.kl.target with kl_controller={options.kl_controller!r}: keep one of the two")
    if kl.unbiased_gradient and options.kl != "k2_as_loss":  # whose gradient that is
        problems.append("--algo.kl.unbiased_gradient is about OpenRLHF's own KL, which kl replaces: leave it out")
    if kl.estimator not in ("k1", str(options.kl)[:2]):  # its default, and what a launch script may have
        problems.append(f"--algo.kl.estimator {kl.estimator} names OpenRLHF's own KL, which kl replaces: leave it out")
    if kl.use_loss and in_reward:
        problems.append(f"--algo.kl.use_loss with {options.kl}, which goes into the reward: leave it out")
    if kl.target is not None and not in_reward:
        problems.append(
            "--algo.kl.target adapts beta to the KL that OpenRLHF logs, which is wrong for a KL in the loss (it is "
            "weighted by tokens twice): use --kl-controller proportional --kl-target ... instead"
        )
    if options.kl_baseline == "leave_one_out" and args.rollout.n_samples_per_prompt < 2:
        problems.append("kl_baseline='leave_one_out' needs --rollout.n_samples_per_prompt of 2 or more")
    if options.kl_leave_out_equal_rewards and args.rollout.n_samples_per_prompt < 2:
        problems.append("kl_leave_out_equal_rewards needs --rollout.n_samples_per_prompt of 2 or more")
    if options.kl_leave_out_equal_rewards and advantage.estimator not in GROUP_ESTIMATORS:
        problems.append(
            f"kl_leave_out_equal_rewards with --algo.advantage.estimator {advantage.estimator}, where groups of equal "
            f"rewards have advantages, too: use one of {', '.join(GROUP_ESTIMATORS)}, or leave it out"
        )
    if options.kl_baseline == "leave_one_out" and advantage.estimator == "gae" and in_reward:
        problems.append("kl_baseline='leave_one_out' with gae, whose critic is the baseline already: leave it out")
    if in_reward and args.actor.policy_loss_type == "gspo":
        problems.append(
            "--actor.policy_loss_type gspo gives every token the mean advantage of its sequence, and with it the mean "
            "of the KL coefficients: use kl_placement='loss'"
        )
    return problems


def _bias_problems(args: Any, in_reward: bool) -> list[str]:
    """Flags under which the gradient isn't the one that is named."""
    problems = []
    if in_reward and args.actor.loss_agg_mode != "token-mean":
        problems.append(
            f"--actor.loss_agg_mode {args.actor.loss_agg_mode} divides each sequence's KL in the reward by its "
            "length, which biases its gradient: use token-mean or kl_placement='loss', or kl_allow_biased"
        )
    if args.rollout.top_p != 1:
        problems.append(
            f"--rollout.top_p {args.rollout.top_p} samples from another distribution than the one whose log-probs are "
            "taken, which biases every sampled KL: use 1.0, or kl_allow_biased"
        )
    if args.train.async_enable and args.algo.advantage.is_correction_level == "off":
        problems.append(
            "--train.async_enable trains on stale samples, but without vLLM's own log-probs nobody knows how stale: "
            "add --algo.advantage.is_correction_level token, or kl_allow_biased"
        )
    return problems


def _warn(args: Any) -> None:
    if args.algo.dynamic_filtering_enable:
        warnings.warn(
            "--algo.dynamic_filtering_enable drops prompts by their rewards: the KL is that of the prompts that "
            "remain",
            stacklevel=2,
        )
