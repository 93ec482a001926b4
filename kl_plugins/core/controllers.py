"""Controllers of beta, the coefficient of the KL to the reference: state machines on Python floats.

A host starts one from its options and calls `update` with sums over the batch once per update, whatever it counts as
one (an optimizer step, a rollout); every unit of time below is such an update.

    >>> controller = ControllerSpec(kl_controller="pi", kl_target=6.0, kl_target_per="sequence").start(beta=0.05)
    >>> controller.beta  # for the first update
    0.05
    >>> round(controller.update(kl_sum=480.0, tokens=5000, sequences=64), 4)  # for the next one: 7.5 nats is too much
    0.0532

What to feed as `kl_sum` is the host's choice. The sum of k1 (log-ratios) over the counted tokens is unbiased for the
reverse KL of samples from the current policy; it is noisy, and may be negative. k3 is unbiased too and never negative,
but has an exponential that can overflow; k2 is biased (Schulman, "Approximating KL Divergence", 2020).

`update` is a pure function of the state and the sums, computed in one order: ranks that feed the same all-reduced sums
agree bit for bit (for `cosine` and `pi`, which call cos, exp and log, if they run the same C library).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, TypeGuard

from kl_plugins.errors import ConfigError, refuse

# Ziegler et al.'s bound on the relative error.
PROPORTIONAL_CLIP = 0.2
# A KL of 0 has the relative error -1; the same on the other side.
PI_CLIP = 1.0
# Of log(beta) on the relative error. Near the reference the KL falls as 1/beta^2, so that a plant which follows beta
# at once is stable for gains below 1/2 only; slower plants are damped better the higher it is.
PI_GAIN = 0.2

_FEEDBACK = ("kl_target", "kl_target_per", "kl_horizon", "kl_beta_min", "kl_beta_max")
_SCHEDULE = ("kl_beta_end", "kl_beta_steps")
# Controller -> the options that it reads.
READS: dict[str, tuple[str, ...]] = {
    "fixed": (),
    "linear": _SCHEDULE,
    "cosine": _SCHEDULE,
    "proportional": _FEEDBACK,
    "pi": _FEEDBACK,
}
TARGET_PER = ("token", "sequence")


@dataclass(frozen=True, kw_only=True)
class ControllerSpec:
    """The options of a controller, under the names that they have in every host.

    Raises `ConfigError` for an option that is out of range, that the chosen controller doesn't read, or that it needs
    and wasn't given. All problems at once.
    """

    kl_controller: str = "fixed"
    """`"fixed"`; `"linear"` or `"cosine"` from the initial beta to `kl_beta_end`; `"proportional"` (Ziegler et al.,
    arXiv 1909.08593, section 2.2) or `"pi"` towards `kl_target`."""
    kl_target: float | None = None
    """The KL to hold, in nats, positive."""
    kl_target_per: str = "token"
    """What the target is a mean over: `"token"`, or `"sequence"` (sum over its tokens; Ziegler et al.'s)."""
    kl_horizon: float = 20.0
    """Updates in which a constant relative error e multiplies beta by about exp(e), at least 1. Make it no shorter
    than the KL takes to follow beta, or beta will swing. Ziegler et al.'s K_beta is 1 / `kl_horizon`: 10 is the 0.1
    of the paper, 19.5 is what its code does (10,000 samples, in batches of 512). Where a host counts its horizon in
    samples, this one is that horizon divided by the samples per update."""
    kl_beta_end: float | None = None
    """Where a schedule ends, at least 0."""
    kl_beta_steps: int | None = None
    """Updates that a schedule takes, at least 1; beta is constant afterwards."""
    kl_beta_min: float = 1e-6
    """Lower bound of a beta with a target, positive: a product never leaves 0."""
    kl_beta_max: float = 100.0
    """Upper bound of a beta with a target. Keep it below the beta at which the learning rate makes the KL term
    unstable: beyond, more beta means more KL, and every controller runs to this bound."""

    def __post_init__(self) -> None:
        bad = _bad_values(self)
        refuse([*bad.values(), *([] if "kl_controller" in bad else _unfit_options(self, bad))])

    @classmethod
    def from_options(cls, **options: Any) -> ControllerSpec:
        """`ControllerSpec.from_options(kl_controller="pi", kl_target=0.05)`; an unknown option is a `ConfigError`."""
        known = [field.name for field in fields(cls)]
        unknown = [
            f"unknown controller option {option!r}: {_closest(option, known)}options are {', '.join(known)}"
            for option in options
            if option not in known
        ]
        try:
            spec = cls(**{option: value for option, value in options.items() if option in known})
        except ConfigError as error:
            refuse([*unknown, *error.args])
        refuse(unknown)
        return spec

    def start(self, beta: float) -> Controller:
        """A controller at `beta`, in reward per nat: at least 0, and within the bounds if there is a target.

        Raises `ConfigError` for another `beta`.
        """
        low, high = 0.0, math.inf
        if "kl_target" in READS[self.kl_controller]:
            low, high = self.kl_beta_min, self.kl_beta_max
        if not _is_finite(beta) or not low <= beta <= high:
            bounds = "a finite number, at least 0"
            if high < math.inf:
                bounds = f"from kl_beta_min={low} to kl_beta_max={high}, or change these"
            refuse([f"beta={beta!r} can't start kl_controller={self.kl_controller!r}: choose {bounds}"])
        return CONTROLLERS[self.kl_controller](self, float(beta))


class Controller:
    """Beta and what it takes to continue, made by `ControllerSpec.start`. By itself it is `fixed`: beta stays."""

    STATE: tuple[str, ...] = ()
    """The attributes that `state_dict` holds. Options aren't among them: a loaded controller keeps its own."""

    def __init__(self, spec: ControllerSpec, beta: float) -> None:
        self.spec = spec
        self.beta = beta

    def update(self, *, kl_sum: float, tokens: float, sequences: float) -> float:
        """The new `beta`, from sums over the whole batch (of all ranks).

        Args:
            kl_sum: a KL estimate in nats, summed over the counted tokens.
            tokens: how many these are.
            sequences: how many sequences they are in.

        Without a target the sums aren't read. With one, a batch without tokens or sequences leaves beta as it is, and
        a sum that is not finite, or a negative count, is a `ValueError` that leaves the controller as it was.
        """
        return self.beta

    def state_dict(self) -> dict[str, Any]:
        """A JSON-able dict; JSON keeps its floats bit for bit."""
        return {"controller": self.spec.kl_controller, **{name: getattr(self, name) for name in self.STATE}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; a beta outside of bounds that were changed since moves to the nearer one.

        Raises `ConfigError`, and changes nothing, for the state of another controller, a key that is missing or
        unknown, or a value that no `state_dict` holds.
        """
        refuse(self._state_problems(state))
        for name in self.STATE:
            setattr(self, name, state[name])
        self._settle()

    def _settle(self) -> None:
        """Make `beta` what the state says."""

    def _state_problems(self, state: Mapping[str, Any]) -> list[str]:
        asked, found = self.spec.kl_controller, state.get("controller")
        if found != asked:
            return [
                f"kl_controller={asked!r} was asked to load a state of controller={found!r}: choose the controller "
                "that the state was saved by, or start without it"
            ]
        names = ("controller", *self.STATE)
        saved = f"a state of {asked!r} has the keys {', '.join(names)}: load what its state_dict() returned"
        problems = [f"{name!r} is missing from the state; {saved}" for name in names if name not in state]
        problems += [f"unknown key {name!r} in the state; {saved}" for name in state if name not in names]
        return problems + [
            f"{name}={state[name]!r} in the state is nothing that {asked!r} saves: load what its state_dict() returned"
            for name in self.STATE
            if name in state and not _is_state(name, state[name])
        ]


class Schedule(Controller):
    """From the initial beta to `kl_beta_end` over `kl_beta_steps` updates, then constant.

    In equal steps (`linear`), or along half a cosine, slow at both ends (`cosine`).
    """

    STATE: tuple[str, ...] = ("updates",)

    def __init__(self, spec: ControllerSpec, beta: float) -> None:
        super().__init__(spec, beta)
        self.initial = beta
        self.updates = 0

    def update(self, *, kl_sum: float, tokens: float, sequences: float) -> float:
        """Beta after one more update, whatever it measured."""
        self.updates += 1
        self._settle()
        return self.beta

    def _settle(self) -> None:
        end, steps = self.spec.kl_beta_end, self.spec.kl_beta_steps
        assert end is not None
        assert steps is not None
        share = min(self.updates / steps, 1.0)
        if self.spec.kl_controller == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        # Not initial + share * (end - initial), which may miss the end by a rounding.
        self.beta = (1 - share) * self.initial + share * end


class Feedback(Controller, ABC):
    """Towards `kl_target`, by the relative error (KL - target) / target."""

    STATE: tuple[str, ...] = ("beta",)

    def __init__(self, spec: ControllerSpec, beta: float) -> None:
        super().__init__(spec, beta)
        assert spec.kl_target is not None
        self.target = spec.kl_target

    def update(self, *, kl_sum: float, tokens: float, sequences: float) -> float:
        """One step on the relative error of the batch's KL."""
        kl_sum, tokens, sequences = float(kl_sum), float(tokens), float(sequences)
        if not all(map(math.isfinite, (kl_sum, tokens, sequences))) or tokens < 0 or sequences < 0:
            raise ValueError(
                f"kl_controller={self.spec.kl_controller!r} needs finite sums and counts from 0 on, found "
                f"kl_sum={kl_sum}, tokens={tokens}, sequences={sequences}: leave out the tokens that are not scored, "
                "and feed k1 if an exponential overflowed"
            )
        if tokens and sequences:
            kl = kl_sum / (tokens if self.spec.kl_target_per == "token" else sequences)
            self._step(kl / self.target - 1)
            self._settle()
        return self.beta

    @abstractmethod
    def _step(self, error: float) -> None:
        """Change the state by one relative error."""

    def _settle(self) -> None:
        self.beta = float(_clip(self.beta, self.spec.kl_beta_min, self.spec.kl_beta_max))


class Proportional(Feedback):
    """beta *= 1 + clip(error, -0.2, 0.2) / horizon: Ziegler et al., arXiv 1909.08593, section 2.2.

    At most 0.2 / horizon per update: 1% at the default, so that a beta that is 100 times too low or too high takes
    some 460 updates.
    """

    def _step(self, error: float) -> None:
        self.beta *= 1 + _clip(error, -PROPORTIONAL_CLIP, PROPORTIONAL_CLIP) / self.spec.kl_horizon


class PI(Feedback):
    """log(beta) = integral + `PI_GAIN` * error, where integral += error / horizon and error is within +-`PI_CLIP`.

    `Proportional` is an integral controller in log(beta); the proportional term here damps its swings, and the wider
    clip gets it home sooner. It also answers at once: the first update can change beta by a factor of
    exp(`PI_GAIN` + 1 / horizon), 1.28 at the default.

    Anti-windup: the integral is kept within the bounds of log(beta), so that beta leaves a bound with the first errors
    of the other sign. A clipped error is integrated as what it was clipped to, not left out: otherwise a beta that is
    far too low would stay there.
    """

    STATE: tuple[str, ...] = ("beta", "integral")

    def __init__(self, spec: ControllerSpec, beta: float) -> None:
        super().__init__(spec, beta)
        self.bounds = math.log(spec.kl_beta_min), math.log(spec.kl_beta_max)
        self.integral = math.log(beta)

    def _step(self, error: float) -> None:
        error = _clip(error, -PI_CLIP, PI_CLIP)
        self.integral += error / self.spec.kl_horizon
        self.beta = math.exp(_clip(self.integral + PI_GAIN * error, *self.bounds))

    def _settle(self) -> None:
        super()._settle()
        self.integral = _clip(float(self.integral), *self.bounds)


CONTROLLERS: dict[str, type[Controller]] = {
    "fixed": Controller,
    "linear": Schedule,
    "cosine": Schedule,
    "proportional": Proportional,
    "pi": PI,
}


def _bad_values(spec: ControllerSpec) -> dict[str, str]:
    """What is wrong with each option by itself."""
    problems = {
        option: f"{option}={found!r} is not offered: {_closest(found, offered)}choose from {', '.join(offered)}"
        for option, offered in {"kl_controller": tuple(READS), "kl_target_per": TARGET_PER}.items()
        if (found := getattr(spec, option)) not in offered
    }
    ranges = {
        "kl_target": (_is_finite(spec.kl_target) and spec.kl_target > 0, "a positive finite KL in nats"),
        "kl_horizon": (_is_finite(spec.kl_horizon) and spec.kl_horizon >= 1, "a finite number of updates, at least 1"),
        "kl_beta_end": (_is_finite(spec.kl_beta_end) and spec.kl_beta_end >= 0, "a finite number, at least 0"),
        "kl_beta_steps": (_is_count(spec.kl_beta_steps) and spec.kl_beta_steps > 0, "a whole number, at least 1"),
        "kl_beta_min": (_is_finite(spec.kl_beta_min) and spec.kl_beta_min > 0, "a positive finite number"),
        "kl_beta_max": (_is_finite(spec.kl_beta_max) and spec.kl_beta_max > 0, "a positive finite number"),
    }
    for option, (right, needed) in ranges.items():
        not_given = getattr(spec, option) is None and _default(option) is None
        if not right and not not_given:
            problems[option] = f"{option}={getattr(spec, option)!r}: give {needed}"
    if not {"kl_beta_min", "kl_beta_max"} & set(problems) and spec.kl_beta_min > spec.kl_beta_max:
        problems["kl_beta_min"] = (
            f"kl_beta_min={spec.kl_beta_min} is above kl_beta_max={spec.kl_beta_max}: give bounds with a beta between"
        )
    return problems


def _unfit_options(spec: ControllerSpec, bad: Collection[str]) -> list[str]:
    """Options that the chosen controller doesn't read but that were changed, and those that it needs."""
    chosen = f"kl_controller={spec.kl_controller!r}"
    problems = []
    for option in (*_FEEDBACK, *_SCHEDULE):
        value = getattr(spec, option)
        if option in bad:
            continue
        if option in READS[spec.kl_controller] and value is None:
            problems.append(f"{chosen} needs {option}, which was not given: set it")
        elif option not in READS[spec.kl_controller] and value != _default(option):
            readers = " or ".join(repr(controller) for controller, reads in READS.items() if option in reads)
            problems.append(f"{option}={value!r} is not used by {chosen}: leave it out, or choose {readers}")
    return problems


def _default(option: str) -> Any:
    return ControllerSpec.__dataclass_fields__[option].default


def _closest(found: object, offered: Collection[str]) -> str:
    close = get_close_matches(str(found), offered, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_state(name: str, value: Any) -> bool:
    if name == "updates":
        return _is_count(value) and value >= 0
    return _is_finite(value) and (value > 0 or name == "integral")


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
