"""The options of `KLSpec` as flat fields with a `kl_` in front, for every host's configuration and command line."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from kl_plugins.controllers import Controller, ControllerSpec
from kl_plugins.errors import ConfigError
from kl_plugins.registry import get_loss
from kl_plugins.spec import KLSpec

# Beyond it a single token's gradient overflows in a model, and gradient clipping turns the whole step into 0 or NaN.
COEFFICIENT_BOUND = 1e6
CONTROLLER_OPTIONS = tuple(f.name for f in fields(ControllerSpec))


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

    def kl_spec(self) -> KLSpec | None:
        """The checked `KLSpec` of these fields, or None if `kl` is None. Raises what `KLSpec` raises."""
        if self.kl is None:
            return None
        options = {n.removeprefix("kl_"): v for n, v in self.kl_options().items() if n not in CONTROLLER_OPTIONS}
        if self.kl_coefficient_bound is None and get_loss(self.kl).may_overflow:
            options["coefficient_bound"] = COEFFICIENT_BOUND
        return KLSpec.from_name(self.kl, **options)

    def controller(self, beta: float) -> Controller:
        """What changes the coefficient `beta` in the course of a training. Raises what `ControllerSpec` raises."""
        return ControllerSpec(**{name: getattr(self, name) for name in CONTROLLER_OPTIONS}).start(beta)

    def spec_problems(self) -> tuple[str, ...]:
        """What `kl_spec` refuses."""
        try:
            self.kl_spec()
        except ConfigError as error:
            return error.args
        return ()

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
        self.kl_weight_clip = list(self.kl_weight_clip)
