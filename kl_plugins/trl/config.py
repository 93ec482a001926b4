"""TRL's configs with flat `kl_*` fields, so that they work from Python, YAML (`TrlParser`) and the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import trl

from kl_plugins.errors import ConfigError, refuse
from kl_plugins.hosts import require_tested
from kl_plugins.registry import get_loss
from kl_plugins.spec import KLSpec
from kl_plugins.trl.sampling import sampling_problems
from kl_plugins.trl.seam import unclaimed_beta

# Beyond it a single token's gradient overflows in a model, and gradient clipping turns the whole step into 0 or NaN.
COEFFICIENT_BOUND = 1e6


def _option(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class KLFields:
    """The KL options of `kl_plugins.KLSpec`, each with a `kl_` in front. `beta` keeps TRL's meaning.

    Raises, before any model is loaded: `UnknownLossError`, `ConfigError` (an option that doesn't exist, isn't used by
    the chosen configuration or contradicts TRL's; `beta=0`; a zero or biased gradient) or `PatchError` (a version of
    TRL that wasn't tested).
    """

    kl: str | None = _option(None, "KL configuration, e.g. k2_as_loss; None leaves TRL's own KL untouched.")
    kl_credit: str | None = _option(None, "token, to_go or sequence; None is the configuration's default.")
    kl_gamma: float = _option(1.0, "Discount per position of kl_credit=to_go, in [0, 1].")
    kl_off_policy: str = _option("token", "Importance weight of the KL: none, token, prefix or sequence.")
    kl_weight_clip: list[float] = _option([0.0, 10.0], "Bounds (low, high) of the importance weight.")
    kl_weight_clip_mode: str = _option("truncate", "Outside the bounds: truncate to them, or mask (weight 0).")
    kl_baseline: str | None = _option(None, "leave_one_out, or None.")
    kl_clip: str | None = _option(None, "PPO's clip on the KL: separate, combined (in the advantage), or None.")
    kl_clip_epsilon: float = _option(0.2, "Half width of the clip range of kl_clip=separate.")
    kl_coefficient_bound: float | None = _option(
        None, "Largest |coefficient| of losses with an exponential; None is 1e6."
    )
    kl_nonfinite: str = _option(
        "error", "A NaN or inf log-prob of the reference: error, or drop (and count) the token."
    )
    kl_allow_biased: bool = _option(False, "Let a configuration with a zero or biased gradient through.")

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # the TRL config that this is mixed into
        for option in ("kl", "kl_credit", "kl_baseline", "kl_clip"):  # the command line has no other way to say None
            if str(getattr(self, option)).lower() in ("none", "null"):
                setattr(self, option, None)
        self.kl_weight_clip = list(self.kl_weight_clip)
        if self.kl is None:
            refuse(self._options_without_kl())
            return
        require_tested("trl")
        refuse([*self._spec_problems(), *self._contradictions()])
        self.beta = unclaimed_beta(self.beta)

    def kl_spec(self) -> KLSpec | None:
        """The checked `KLSpec` of these fields, or None if `kl` is None."""
        if self.kl is None:
            return None
        options = {name.removeprefix("kl_"): value for name, value in self._kl_options().items()}
        if self.kl_coefficient_bound is None and get_loss(self.kl).may_overflow:
            options["coefficient_bound"] = COEFFICIENT_BOUND
        return KLSpec.from_name(self.kl, **options)

    def to_dict(self) -> dict[str, Any]:
        """TRL's, for its logs and files: with `beta` as a plain number."""
        return super().to_dict() | {"beta": float(self.beta)}  # type: ignore[misc]

    def _spec_problems(self) -> tuple[str, ...]:
        try:
            self.kl_spec()
        except ConfigError as error:
            return error.args
        return ()

    def _kl_options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(KLFields) if f.name != "kl"}

    def _options_without_kl(self) -> list[str]:
        changed = [name for name, value in self._kl_options().items() if value != _default(type(self), name)]
        return [f"{', '.join(changed)} set, but kl is None: name a configuration with kl=..."] if changed else []

    def _contradictions(self) -> list[str]:
        problems = []
        if not 0 < self.beta < math.inf:
            problems.append(f"kl={self.kl!r} with beta={self.beta:g}: set a positive finite beta, or kl=None")
        if self.kl_clip == "combined":
            problems += [
                f"{name}={getattr(self, name)!r} is not used with kl_clip='combined', where TRL's own ratio and "
                "epsilon apply to the KL: leave it out"
                for name in ("kl_clip_epsilon", "kl_weight_clip", "kl_weight_clip_mode")
                if getattr(self, name) != _default(type(self), name)
            ]
        return problems + ([] if self.kl_allow_biased else sampling_problems(self))


def _default(config: type, name: str) -> Any:
    found = next(f for f in fields(config) if f.name == name)
    return found.default_factory() if callable(found.default_factory) else found.default


@dataclass
class GRPOConfig(KLFields, trl.GRPOConfig):
    """[`trl.GRPOConfig`] with the options of `KLFields`, and what those raise."""

    def _contradictions(self) -> list[str]:
        problems = super()._contradictions()
        if not self.use_bias_correction_kl:
            problems.append("use_bias_correction_kl=False is about TRL's own KL, which kl replaces: use kl_off_policy")
        if self.kl_clip == "combined":
            problems += [
                f"{name}={getattr(self, name)!r} masks tokens of the policy loss, and with kl_clip='combined' their "
                "KL with them: use kl_clip='separate' or None"
                for name, neutral in (("off_policy_mask_threshold", None), ("top_entropy_quantile", 1.0))
                if getattr(self, name) != neutral
            ]
        return problems


@dataclass
class RLOOConfig(KLFields, trl.RLOOConfig):
    """[`trl.RLOOConfig`] with the options of `KLFields`, and what those raise."""

    kl_baseline: str | None = _option(
        "auto", "leave_one_out, None, or auto: leave_one_out for the in-reward configurations, as RLOO does."
    )

    def _kl_options(self) -> dict[str, Any]:
        options = super()._kl_options()
        if options["kl_baseline"] == "auto" and self.kl is not None:
            options["kl_baseline"] = "leave_one_out" if get_loss(self.kl).in_reward else None
        return options

    def _contradictions(self) -> list[str]:
        problems = super()._contradictions()
        if self.kl_clip == "combined" and self.kl_credit != "sequence":
            problems.append(
                f"kl_clip='combined' with kl_credit={self.kl_credit!r}: RLOO's advantage is one number a sequence; "
                "use kl_credit='sequence', or kl_clip='separate'"
            )
        return problems
