"""The options of `KLSpec` as flat fields with a `kl_` in front, for every host's configuration and command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kl_plugins.core.controllers import Controller, ControllerSpec
from kl_plugins.core.registry import REVERSE_KL, KLLoss, get_loss
from kl_plugins.core.spec import KLSpec
from kl_plugins.errors import ConfigError
from kl_plugins.integration.choice import PICKED, Choice, choose, in_advantage, updates_per_rollout
from kl_plugins.integration.leave_out import words_of

# Beyond it a single token's gradient overflows in a model, and gradient clipping turns the whole step into 0 or NaN.
COEFFICIENT_BOUND = 1e6
# What lets a zero or biased gradient through, as messages name it to those who write Python, YAML or a command line.
ALLOW_BIASED = "kl_allow_biased=True (--kl-allow-biased)"
CONTROLLER_OPTIONS = tuple(f.name for f in fields(ControllerSpec))
UNUSED_IN_REWARD = ("kl_gamma", "kl_off_policy", "kl_weight_clip", "kl_weight_clip_mode", "kl_clip", "kl_clip_epsilon")
LEAVE_OUT_OPTIONS = ("kl_leave_out", "kl_leave_out_equal_rewards")


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text, which command lines show."""
    metadata = {"help": help, "default": default}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def without_words(options: dict[str, Any]) -> dict[str, Any]:
    """`options` with None for "none" and "null" where None may be chosen: a command line can't say it otherwise."""
    may_be_none = {"kl", "kl_credit", "kl_baseline", "kl_clip", "kl_reference"} & options.keys()
    return options | {name: None for name in may_be_none if str(options[name]).lower() in ("none", "null")}


@dataclass
class KLOptions:
    """One flat field for each option of `kl_plugins.KLSpec`; `kl` is the name of the configuration."""

    kl: str | None = option(
        None, "reverse_kl, or a KL configuration by name, e.g. k1_in_reward; None leaves the host's own KL untouched."
    )
    kl_credit: str | None = option(
        None,
        "token, to_go or sequence; None: as the trainer's rewards if the KL is among them, else the KL's default.",
    )
    kl_gamma: float = option(1.0, "Discount per position of kl_credit=to_go, in [0, 1].")
    kl_off_policy: str = option("token", "Importance weight of the KL: none, token, prefix or sequence.")
    kl_weight_clip: list[float] = option([0.0, 10.0], "Bounds (low, high) of the importance weight.")
    kl_weight_clip_mode: str = option("truncate", "Outside the bounds: truncate to them, or mask (weight 0).")
    kl_baseline: str | None = option(
        "auto",
        "leave_one_out, group_mean, None, or auto: as the trainer's rewards if the KL is among them, else None.",
    )
    kl_clip: str | None = option(
        "auto",
        "PPO's clip on the KL: separate, combined (in the advantage), None, or auto: None, or what reverse_kl picks.",
    )
    kl_clip_epsilon: float = option(0.2, "Half width of the clip range of kl_clip=separate.")
    kl_coefficient_bound: float | None = option(
        None, "Largest |coefficient| of losses with an exponential; None is 1e6."
    )
    kl_nonfinite: str = option(
        "error", "A NaN or inf log-prob of the reference: error, or drop (and count) the token."
    )
    kl_allow_biased: bool = option(False, "Let a configuration with a zero or biased gradient through.")
    kl_controller: str = option(
        "fixed", "Of beta: fixed; linear or cosine, to kl_beta_end; proportional or pi, towards kl_target."
    )
    kl_target: float | None = option(None, "KL to hold, in nats (kl_controller=proportional or pi).")
    kl_target_per: str = option("token", "What kl_target is a mean over: token, or sequence (sums over its tokens).")
    kl_horizon: float = option(20.0, "Updates in which a constant relative error e multiplies beta by about exp(e).")
    kl_beta_end: float | None = option(None, "Where beta ends (kl_controller=linear or cosine).")
    kl_beta_steps: int | None = option(None, "In how many updates it gets there.")
    kl_beta_min: float = option(1e-6, "Lower bound of a beta with a target.")
    kl_beta_max: float = option(100.0, "Upper bound of a beta with a target.")
    kl_leave_out: list[str] = option(
        [], "Tokens left out of the KL: eos, special, first (of a completion), a token's id, or its text."
    )
    kl_leave_out_equal_rewards: bool = option(
        False, "Leave out the KL of groups whose completions all have the same reward."
    )

    def kl_spec(self) -> KLSpec | None:
        """The checked `KLSpec` of these fields, or None if `kl` is None. Raises what `KLSpec` raises."""
        return self._spec(self.kl_options())

    def _spec(self, chosen: Mapping[str, Any], *, gamma: str = "kl_gamma=") -> KLSpec | None:
        """The `KLSpec` of `kl` and the `chosen` options; `gamma` is what its discount is called in messages."""
        if self.kl is None:
            return None
        elsewhere = (*CONTROLLER_OPTIONS, *LEAVE_OUT_OPTIONS)
        options = {n.removeprefix("kl_"): v for n, v in chosen.items() if n not in elsewhere}
        if self.kl_coefficient_bound is None and self.kl_loss.may_overflow:
            options["coefficient_bound"] = COEFFICIENT_BOUND
        if set(self.kl_leave_out) - {"first"}:
            options["left_out_bound"] = COEFFICIENT_BOUND
        try:
            return KLSpec.from_name(self.kl_loss.name, **options)
        except ConfigError as error:
            raise ConfigError(*(_by_field(problem).replace("kl_gamma=", gamma) for problem in error.args)) from None

    @property
    def kl_loss(self) -> KLLoss:
        """The record of what `kl`, which is not None, names or picks. Raises what `get_loss` raises."""
        return get_loss(PICKED if self.kl == REVERSE_KL else str(self.kl))

    def kl_choice(self, *flags: Any) -> Choice:
        """What `kl`, which is not None, and the options left open stand for; `flags` are the host's, if it has any.

        Here no host is known. Raises what `get_loss` raises.
        """
        return choose(str(self.kl), self._given())

    def _given(self) -> dict[str, Any]:
        """The options that the user has set, to something else than the default of this package."""
        return {name: getattr(self, name) for name in self.changed_kl_options()}

    def controller(self, beta: float) -> Controller:
        """What changes the coefficient `beta` in the course of a training. Raises what `ControllerSpec` raises."""
        return ControllerSpec(**{name: getattr(self, name) for name in CONTROLLER_OPTIONS}).start(beta)

    def leaves_out(self) -> bool:
        """Whether anything may be left out of the KL."""
        return bool(self.kl_leave_out) or self.kl_leave_out_equal_rewards

    def kl_options(self, *flags: Any) -> dict[str, Any]:
        """What holds for each option but `kl`, under the names of the fields; `flags` are those of `kl_choice`."""
        options = {f.name: getattr(self, f.name) for f in fields(KLOptions) if f.name != "kl"}
        return options if self.kl is None else options | self.kl_choice(*flags).options

    def changed_kl_options(self) -> list[str]:
        """The options, but for `kl`, that are not at the default of this package."""
        defaults = {f.name: f.metadata["default"] for f in fields(self) if "default" in f.metadata}
        return [name for name, value in defaults.items() if name != "kl" and getattr(self, name) != value]

    def _none_from_words(self) -> None:
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name.startswith("kl")}
        for name, value in without_words(chosen).items():
            setattr(self, name, value)
        clip: Any = self.kl_weight_clip
        self.kl_weight_clip = list(clip) if isinstance(clip, tuple) else clip
        self.kl_leave_out = words_of(self.kl_leave_out)


@dataclass
class ReferenceOptions(KLOptions):
    """The options of TRL's GRPO: `KLOptions`, which policy the KL is to, and what it is divided by."""

    kl_reference: str | None = option(
        None,
        "What the KL is to: a path or hub id; with PEFT base, or adapter:NAME (or its path); None is TRL's.",
    )
    kl_reference_every: int | None = option(
        None, "Optimizer steps after which the reference moves to the policy; None: it stays where it is."
    )
    kl_reference_decay: float = option(0.0, "What remains of the reference then: 0 replaces it, 0.99 averages.")

    kl_scale: str = option(
        "none", "reward: divide the KL by the standard deviation that rewards are divided by, if they are; or none."
    )

    kl_host = "grpo"
    """Whose rewards the KL is among, in `choice.TREATMENTS`."""

    def kl_choice(self, *flags: Any) -> Choice:
        """What `kl`, which is not None, and the options left open stand for under TRL's own, of the same object."""
        host: Any = self
        return choose(
            str(self.kl),
            self._given(),
            host=self.kl_host,
            off_policy=bool(host.use_vllm) or updates_per_rollout(host)[1],
            in_advantage=in_advantage(self.kl_host, host),
        )


@dataclass
class GMPOOptions(ReferenceOptions):
    """The options of TRL's GMPO: those of GRPO."""

    kl_host = "gmpo"


@dataclass
class RLOOOptions(ReferenceOptions):
    """The options of TRL's RLOO: those of GRPO, with what fits the rewards of RLOO where they are left open."""

    kl_host = "rloo"


@dataclass
class PlacementOptions(KLOptions):
    """`KLOptions`, and whether the term is in the loss or in the reward, for hosts with returns and a critic."""

    kl_placement: str = option(
        "auto",
        "loss, reward (through the host's returns and critic), or auto: reward for in-reward configurations.",
    )

    @property
    def kl_in_reward(self) -> bool:
        """Whether the term is a per-token reward instead of a term of the loss."""
        if self.kl is None or self.kl_placement != "auto":
            return self.kl is not None and self.kl_placement == "reward"
        return self.kl_loss.in_reward

    def in_reward(self, *flags: Any, gamma: float) -> dict[str, Any]:
        """What holds for each option but `kl` in the reward, under a host's own discount `gamma`, ratio and clip."""
        defaults = {f.name: f.metadata["default"] for f in fields(KLOptions)}
        options = KLOptions.kl_options(self, *flags) | {name: defaults[name] for name in UNUSED_IN_REWARD}
        options["kl_clip"] = "combined"
        if options["kl_credit"] == "to_go":
            options["kl_gamma"] = gamma
        return options


@dataclass
class PPOOptions(PlacementOptions):
    """The options of TRL's PPO. `gamma`, its discount of rewards, is read from the same object."""

    def kl_choice(self, *flags: Any) -> Choice:
        """What `kl`, which is not None, and the options left open stand for among PPO's rewards."""
        return choose(str(self.kl), self._given(), host="ppo")

    def kl_options(self, *flags: Any) -> dict[str, Any]:
        """What holds for each option but `kl`; in the reward TRL's own discount, ratio and clip."""
        host: Any = self
        return self.in_reward(gamma=host.gamma) if self.kl_in_reward else super().kl_options()

    def kl_spec(self) -> KLSpec | None:
        """The checked `KLSpec`, or None if `kl` is None. Raises what `KLSpec` raises."""
        return self._spec(self.kl_options(), gamma="gamma=" if self.kl_in_reward else "kl_gamma=")


@dataclass
class OpenRLHFOptions(PlacementOptions):
    """The options of OpenRLHF, whose own `--algo.kl.init_coef` stays the coefficient (beta).

    `args` of the methods are OpenRLHF's parsed (hierarchical) flags.
    """

    kl: str | None = option(
        None, "reverse_kl, or a KL configuration by name, e.g. k1_in_reward; `kl-plugins explain` lists them."
    )
    kl_clip: str | None = option("auto", "PPO's clip on a KL in the loss: separate, or none; auto is none.")
    kl_monitor: bool = option(
        False, "Log what the KL does (docs/monitoring.md): that of --kl or, without it, OpenRLHF's own."
    )

    def __post_init__(self) -> None:
        self._none_from_words()

    def kl_choice(self, args: Any = None) -> Choice:
        """What `kl`, which is not None, and the options left open stand for under the flags `args`."""
        if args is None:
            return choose(str(self.kl), self._given())
        groups = args.rollout.n_samples_per_prompt > 1
        estimator = args.algo.advantage.estimator
        return choose(str(self.kl), self._given(), host="openrlhf", estimator=estimator, groups=groups)

    def kl_options(self, args: Any = None) -> dict[str, Any]:
        """What holds for each option but `kl` under the flags `args`; without them as if they were at their defaults.

        In the reward these are OpenRLHF's own discount, ratio and clip.
        """
        if self.kl_in_reward:
            return self.in_reward(args, gamma=1.0 if args is None else openrlhf_gamma(args))
        return super().kl_options(args)

    def kl_spec(self, args: Any = None) -> KLSpec | None:
        """The checked `KLSpec` under the flags `args`, or None if `kl` is None. Raises what `KLSpec` raises."""
        return self._spec(self.kl_options(args), gamma="--algo.advantage.gamma " if self.kl_in_reward else "kl_gamma=")


def openrlhf_gamma(args: Any) -> float:
    """What OpenRLHF, with the flags `args`, discounts rewards with: the other estimators set gamma to 1 themselves."""
    advantage = args.algo.advantage
    return float(advantage.gamma) if advantage.estimator in ("gae", "reinforce") else 1.0


def _by_field(problem: str) -> str:
    """A message of `KLSpec` with the names that its options have as fields and flags."""
    names = "|".join(f.name for f in fields(KLSpec) if f.name != "name")
    return re.sub(rf"(?<!\w)({names})(?==)", r"kl_\1", problem).replace("kl_allow_biased=True", ALLOW_BIASED)
