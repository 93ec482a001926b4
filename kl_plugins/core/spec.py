"""`KLSpec`: a configuration and its options, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from kl_plugins.core import estimators
from kl_plugins.core.registry import LOSSES, KLLoss, get_loss
from kl_plugins.errors import ConfigError, refuse

OFF_POLICY = ("none", "token", "prefix", "sequence")
WEIGHT_CLIP_MODES = ("truncate", "mask")
BASELINES = (None, "leave_one_out", "group_mean")
CLIPS = (None, "separate", "combined")
NONFINITE = ("error", "drop")
TAILS = ("sampled", "bucket")


@dataclass(frozen=True, kw_only=True)
class KLSpec:
    """One KL configuration, as `kl_plugins.kl_terms` computes it.

    Raises:
        UnknownLossError: nobody registered `name`.
        ConfigError: an option doesn't exist, is out of range, isn't used by what was chosen, or the expected
            gradient is zero or biased and `allow_biased` is not set. All problems at once.

    Example:
        >>> spec = KLSpec(name="k1_in_reward", off_policy="prefix", weight_clip=(0, 5))
        >>> spec.credit, spec.gradient_of
        ('to_go', 'reverse_kl')
        >>> KLSpec(name="k1_as_loss")
        Traceback (most recent call last):
            ...
        kl_plugins.errors.ConfigError: k1_as_loss was asked for, but its expected gradient is zero (E[grad log pi]...
    """

    name: str
    """A registered loss, see `kl-plugins explain`."""
    credit: str | None = None
    """Which coefficients a token answers for: `"token"` its own, `"to_go"` those from it on, `"sequence"` all of
    them. `None` becomes the loss's default."""
    gamma: float = 1.0
    """Discount per position of `credit="to_go"`, in [0, 1]. Between 0 and 1 the gradient lies between the local and
    the sequence KL and is that of neither: it needs `allow_biased`."""
    off_policy: str = "token"
    """Importance weight: `"none"` (right only on-policy), `"token"` rho_t, `"prefix"` the product of rho up to the
    token, `"sequence"` the product of all. Without `behavior_logp` every weight is 1."""
    weight_clip: tuple[float, float] = (0.0, 10.0)
    """Bounds (low, high) of the importance weight; high may be inf."""
    weight_clip_mode: str = "truncate"
    """Outside the bounds: `"truncate"` to them, or `"mask"` (weight 0)."""
    baseline: str | None = None
    """`"leave_one_out"` subtracts the mean coefficient of the other members of a prompt's group at the position, as
    RLOO does with rewards. `"group_mean"` is 1 - 1/G times the result, G the size of the group: what GRPO makes of
    rewards by subtracting a mean with the completion's own in it. The expected gradient is then 1 - 1/G times that of
    `gradient_of`, as the rewards' is, so that the two keep their proportion."""
    clip: str | None = None
    """PPO's clip on the coefficient as a cost: `"separate"` gives the KL a clipped head of its own, `"combined"` is
    for hosts that put the coefficient into a per-token advantage, under the policy's own ratio and clip."""
    clip_epsilon: float = 0.2
    """Half width of PPO's clip range around a ratio of 1, in (0, 1)."""
    coefficient_bound: float | None = None
    """Largest |coefficient|, for losses with an exponential in it. `None` is the largest finite number of the dtype:
    it only keeps an overflow from becoming inf, and the gradient's norm still overflows where tokens are some e^44
    times less likely than under the reference: set it, to 1e4 say, if yours are. It never becomes 0."""
    left_out_bound: float | None = None
    """Largest |cost|, in nats, of a left-out token to those before it, which is 1 - exp(-u). `None` is the largest
    finite number, as for `coefficient_bound`."""
    nonfinite: str = "error"
    """A NaN or inf log-prob at a counted token: `"error"`, or `"drop"` the token and count it."""
    top_k: int | None = None
    """Of an exact KL: sum only over the policy's `top_k` likeliest tokens. `None`: over the whole vocabulary."""
    tail: str = "sampled"
    """With `top_k`, the rest of the vocabulary: `"sampled"` lets a sampled token outside the head stand for it (its
    coefficient is u + 1, and the expected gradient stays exact), `"bucket"` takes it for one token, which gives the
    gradient of a lower bound of the KL and needs `allow_biased`."""
    allow_biased: bool = False
    """Let a configuration through whose expected gradient is zero or biased (for ablations)."""

    def __post_init__(self) -> None:
        loss = get_loss(self.name)
        if self.credit is None:
            object.__setattr__(self, "credit", loss.default_credit)
        given: Any = self.weight_clip
        if isinstance(given, list):  # from YAML or the command line
            object.__setattr__(self, "weight_clip", tuple(given))
        bad = _bad_values(self, loss)
        refuse([*bad.values(), *_unused_options(self, loss, bad), *_refused_gradient(self, loss, bad)])
        object.__setattr__(self, "weight_clip", tuple(map(float, self.weight_clip)))

    @classmethod
    def from_name(cls, name: str, **options: Any) -> KLSpec:
        """`KLSpec.from_name("k2_as_loss", off_policy="token")`; an unknown option is a `ConfigError`."""
        known = [field.name for field in fields(cls) if field.name != "name"]
        unknown = []
        for option in options:
            if option not in known:
                close = get_close_matches(option, known, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                unknown.append(f"unknown KL option {option!r}: {hint}options are {', '.join(known)}")
        try:
            spec = cls(name=name, **{option: value for option, value in options.items() if option in known})
        except ConfigError as error:
            refuse([*unknown, *error.args])
        refuse(unknown)
        return spec

    @property
    def loss(self) -> KLLoss:
        """The registered record."""
        return LOSSES.get(self.name) or get_loss(self.name)

    @property
    def gradient_of(self) -> str:
        """The expected on-policy gradient: `"reverse_kl"`, `"local_reverse_kl"`, `"forward_kl"`,
        `"local_forward_kl"`, `"zero"` or `"biased"`."""
        if self.top_k is not None and self.tail == "bucket":
            return "biased"
        declared = self.loss.gradient_of[str(self.credit)]
        if declared in ("zero", "biased") or self.credit != "to_go" or self.gamma == 1:
            return declared
        return self.loss.gradient_of.get("token", "biased") if self.gamma == 0 else "biased"

    @property
    def can_leave_tokens_out(self) -> bool:
        """Whether what a left-out token costs is known: of sampled KLs without credit, and of k1."""
        return not self.loss.exact and (self.credit == "token" or self.loss.coefficient is estimators.k1)


def _bad_values(spec: KLSpec, loss: KLLoss) -> dict[str, str]:
    """What is wrong with each option by itself."""
    choices = {
        "credit": tuple(loss.gradient_of),
        "off_policy": OFF_POLICY,
        "weight_clip_mode": WEIGHT_CLIP_MODES,
        "baseline": BASELINES,
        "clip": CLIPS,
        "nonfinite": NONFINITE,
        "tail": TAILS,
    }
    problems = {
        option: f"{option}={found!r} is not offered by {spec.name}: choose from {', '.join(map(repr, offered))}"
        for option, offered in choices.items()
        if (found := getattr(spec, option)) not in offered
    }
    if not _is_number(spec.gamma) or not 0 <= spec.gamma <= 1:
        problems["gamma"] = f"gamma={spec.gamma!r}: a discount is a number in [0, 1]"
    if not _is_number(spec.clip_epsilon) or not 0 < spec.clip_epsilon < 1:
        problems["clip_epsilon"] = f"clip_epsilon={spec.clip_epsilon!r}: PPO's clip range is a number in (0, 1)"
    for name in ("coefficient_bound", "left_out_bound"):
        bound = getattr(spec, name)
        if bound is not None and not (_is_number(bound) and 0 < bound < math.inf):
            problems[name] = f"{name}={bound!r}: a bound is a positive finite number, or None"
    if spec.top_k is not None and not (isinstance(spec.top_k, int) and _is_number(spec.top_k) and spec.top_k > 0):
        problems["top_k"] = f"top_k={spec.top_k!r}: a number of tokens is a positive whole number, or None"
    if not _is_weight_clip(spec.weight_clip):
        problems["weight_clip"] = (
            f"weight_clip={spec.weight_clip!r}: give (low, high) with 0 <= low <= 1 <= high, so that an on-policy "
            "weight of 1 is left alone"
        )
    return problems


def _is_weight_clip(weight_clip: Any) -> bool:
    if not isinstance(weight_clip, tuple) or len(weight_clip) != 2 or not all(map(_is_number, weight_clip)):
        return False
    low, high = weight_clip
    return bool(0 <= low <= 1 <= high and low < high)


def _unused_options(spec: KLSpec, loss: KLLoss, bad: Collection[str]) -> list[str]:
    """Options that were changed but that the rest of the configuration never reads."""
    scoreless = loss.exact and spec.credit == "token"  # no coefficient of the score, but for a sampled tail
    weightless = "off_policy='none' has no weights" if spec.off_policy == "none" else ""
    if scoreless and spec.off_policy == "token" and (spec.top_k is None or spec.tail == "bucket"):
        weightless = "its sum is under the policy already, with weight 1 for off_policy='token'"
    unused = {
        "gamma": "only credit='to_go' discounts" if spec.credit != "to_go" else "",
        "weight_clip": weightless,
        "weight_clip_mode": weightless,
        "clip_epsilon": "only clip='separate' and clip='combined' clip" if spec.clip is None else "",
        "coefficient_bound": "" if loss.may_overflow else "its coefficient grows no faster than the log-ratio squared",
        "baseline": "the gradient within a step is analytic and has no coefficient" if scoreless else "",
        "clip": "the gradient within a step is analytic and has no coefficient" if scoreless else "",
        "top_k": "" if loss.exact else "only exact KLs sum over the vocabulary",
        "tail": "" if loss.exact and spec.top_k is not None else "only an exact KL with top_k has a tail",
    }
    defaults = {field.name: field.default for field in fields(KLSpec)}
    problems = [
        f"{option}={getattr(spec, option)!r} is not used by {spec.name} as configured: {why}; leave it out"
        for option, why in unused.items()
        if why and option not in bad and getattr(spec, option) != defaults[option]
    ]
    if spec.clip == "combined" and loss.exact and not scoreless:
        problems.append(
            f"clip='combined' was asked for, but a part of {spec.name}'s gradient is analytic and no advantage: use "
            "clip='separate', which clips the coefficients of later KLs, or leave clip out"
        )
    if spec.clip is not None and spec.off_policy != "token" and not {"clip", "off_policy"} & set(bad):
        problems.append(
            f"clip={spec.clip!r} clips the token ratio, but off_policy={spec.off_policy!r} was asked for: use "
            "off_policy='token', or leave clip out"
        )
    return problems


def _refused_gradient(spec: KLSpec, loss: KLLoss, bad: Collection[str]) -> list[str]:
    if spec.allow_biased or {"credit", "gamma"} & set(bad) or spec.gradient_of not in ("zero", "biased"):
        return []
    if spec.top_k is not None and loss.exact and spec.tail == "bucket":
        return [
            f"{spec.name} with tail='bucket': the expected gradient is that of a lower bound, the KL of distributions "
            "whose tails are one token; use tail='sampled' or top_k=None, or pass allow_biased=True for an ablation"
        ]
    if loss.gradient_of[str(spec.credit)] != spec.gradient_of:
        return [
            f"{spec.name} with gamma={spec.gamma}: the expected gradient is that of neither the local nor the "
            f"sequence KL; use gamma=1 (or credit='token'), or pass allow_biased=True if the discount is meant"
        ]
    found = f"{spec.gradient_of} ({loss.expected})" if loss.expected else spec.gradient_of
    return [
        f"{spec.name} was asked for, but its expected gradient is {found}: use {loss.instead or 'another loss'} "
        "instead, or pass allow_biased=True for an ablation"
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


__all__ = ["ConfigError", "KLSpec"]
