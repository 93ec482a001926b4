"""The options of `KLSpec` as flat fields with a `kl_` in front, for every host's configuration and command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from kl_plugins.core.controllers import Controller, ControllerSpec
from kl_plugins.core.registry import get_loss
from kl_plugins.core.spec import KLSpec
from kl_plugins.errors import ConfigError
from kl_plugins.integration.leave_out import words_of

# Beyond it a single token's gradient overflows in a model, and gradient clipping turns the whole step into 0 or NaN.
COEFFICIENT_BOUND = 1e6
CONTROLLER_OPTIONS = tuple(f.name for f in fields(ControllerSpec))
LEAVE_OUT_OPTIONS = ("kl_leave_out", "kl_leave_out_equal_rewards")


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text, which command lines show."""
    metadata = {"help": help, "default": default}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def without_words(options: dict[str, Any]) -> dict[str, Any]:
    """With None for "none" and "null", where None is an option: a command line has no other way to say it."""
    may_be_none = {"kl", "kl_credit", "kl_baseline", "kl_clip", "kl_top_k"} & options.keys()
    return options | {name: None for name in may_be_none if str(options[name]).lower() in ("none", "null")}


@dataclass
class KLOptions:
    """One flat field for each option of `kl_plugins.KLSpec`; `kl` is the name of the configuration."""

    kl: str | None = option(None, "KL configuration, e.g. k2_as_loss; None leaves the host's own KL untouched.")
    kl_credit: str | None = option(None, "token, to_go or sequence; None is the configuration's default.")
    kl_gamma: float = option(1.0, "Discount per position of kl_credit=to_go, in [0, 1].")
    kl_off_policy: str = option("token", "Importance weight of the KL: none, token, prefix or sequence.")
    kl_weight_clip: list[float] = option([0.0, 10.0], "Bounds (low, high) of the importance weight.")
    kl_weight_clip_mode: str = option("truncate", "Outside the bounds: truncate to them, or mask (weight 0).")
    kl_baseline: str | None = option(None, "leave_one_out, or None.")
    kl_clip: str | None = option(None, "PPO's clip on the KL: separate, combined (in the advantage), or None.")
    kl_clip_epsilon: float = option(0.2, "Half width of the clip range of kl_clip=separate.")
    kl_coefficient_bound: float | None = option(
        None, "Largest |coefficient| of losses with an exponential; None is 1e6."
    )
    kl_nonfinite: str = option(
        "error", "A NaN or inf log-prob of the reference: error, or drop (and count) the token."
    )
    kl_top_k: int | None = option(None, "Of an exact KL: sum over the likeliest tokens only; None is all of them.")
    kl_tail: str = option("sampled", "With kl_top_k, the rest of the vocabulary: sampled, or bucket (biased).")
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
        if self.kl is None:
            return None
        elsewhere = (*CONTROLLER_OPTIONS, *LEAVE_OUT_OPTIONS)
        options = {n.removeprefix("kl_"): v for n, v in self.kl_options().items() if n not in elsewhere}
        if self.kl_coefficient_bound is None and get_loss(self.kl).may_overflow:
            options["coefficient_bound"] = COEFFICIENT_BOUND
        if set(self.kl_leave_out) - {"first"}:
            options["left_out_bound"] = COEFFICIENT_BOUND
        try:
            return KLSpec.from_name(self.kl, **options)
        except ConfigError as error:
            raise ConfigError(*map(_by_field, error.args)) from None

    def controller(self, beta: float) -> Controller:
        """What changes the coefficient `beta` in the course of a training. Raises what `ControllerSpec` raises."""
        return ControllerSpec(**{name: getattr(self, name) for name in CONTROLLER_OPTIONS}).start(beta)

    def spec_problems(self) -> tuple[str, ...]:
        """What `kl_spec` refuses."""
        try:
            spec = self.kl_spec()
        except ConfigError as error:
            return error.args
        return self.left_out_problems(spec)

    def left_out_problems(self, spec: KLSpec | None) -> tuple[str, ...]:
        """What is wrong with `kl_leave_out`, before there is a tokenizer."""
        if spec is None or spec.can_leave_tokens_out or not set(self.kl_leave_out) - {"first"}:
            return ()
        asked = f"kl_leave_out={self.kl_leave_out} with {spec.name} and credit {spec.credit!r}: "
        if spec.loss.exact:
            why = "an exact KL sums over all tokens, so that no kind of them can be left out"
            return (asked + why + "; use 'first', kl_leave_out_equal_rewards, or kl='k1_in_reward' or 'k2_as_loss'",)
        why = "what a left-out token costs those before it is known for k1 only"
        return (asked + why + "; use kl_credit='token' or kl='k1_in_reward'",)

    def leaves_out(self) -> bool:
        """Whether anything may be left out of the KL."""
        return bool(self.kl_leave_out) or self.kl_leave_out_equal_rewards

    def controller_problems(self, beta: float) -> tuple[str, ...]:
        """What `controller` refuses."""
        try:
            self.controller(beta)
        except ConfigError as error:
            return error.args
        return ()

    def kl_options(self) -> dict[str, Any]:
        """What was chosen for each option but `kl`, under the names of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(KLOptions) if f.name != "kl"}

    def changed_kl_options(self) -> list[str]:
        """The options that are not at the default of this package."""
        defaults = {f.name: f.metadata["default"] for f in fields(self) if "default" in f.metadata}
        return [name for name in self.kl_options() if getattr(self, name) != defaults[name]]

    def _none_from_words(self) -> None:
        for name, value in without_words({f.name: getattr(self, f.name) for f in fields(KLOptions)}).items():
            setattr(self, name, value)
        clip: Any = self.kl_weight_clip
        self.kl_weight_clip = list(clip) if isinstance(clip, tuple) else clip
        self.kl_leave_out = words_of(self.kl_leave_out)


def _by_field(problem: str) -> str:
    """With an option of `KLSpec` as the field that it is here."""
    names = "|".join(f.name for f in fields(KLSpec) if f.name != "name")
    return re.sub(rf"(?<!\w)({names})(?==)", r"kl_\1", problem)


@dataclass
class ReferenceOptions:
    """Which policy the KL is to, for the hosts whose reference can be chosen."""

    kl_reference: str | None = option(
        None,
        "What the KL is to: a path or hub id; with PEFT base, or adapter:NAME (or its path); None is TRL's.",
    )
    kl_reference_every: int | None = option(
        None, "Optimizer steps after which the reference moves to the policy; None: it stays where it is."
    )
    kl_reference_decay: float = option(0.0, "What remains of the reference then: 0 replaces it, 0.99 averages.")

    def changed_reference_options(self) -> list[str]:
        """The options that are not at their default."""
        return [f.name for f in fields(ReferenceOptions) if getattr(self, f.name) != f.default]

    def reference_problems(self) -> Iterator[str]:
        """What is wrong with them, before there is a model."""
        every: Any = self.kl_reference_every
        decay: Any = self.kl_reference_decay
        reference: Any = self.kl_reference
        if reference is not None and not isinstance(reference, str):
            yield f"kl_reference={reference!r}: a path, a hub id, 'base' or 'adapter:NAME' was expected"
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            yield f"kl_reference_every={every!r}: a number of optimizer steps, at least 1"
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            yield f"kl_reference_decay={decay!r}: what remains of the reference at an update is in [0, 1)"
        elif decay and every is None:
            yield f"kl_reference_decay={decay} moves nothing by itself: set kl_reference_every, 1 for all steps"
        if self.kl_reference == "adapter:ref":
            yield "kl_reference='adapter:ref', TRL's name for its own: save that adapter under another name"
        if every is not None and self.kl_reference == "base":
            yield "kl_reference='base' with kl_reference_every: the base model is no adapter to move; leave one out"
