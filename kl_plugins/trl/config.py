"""TRL's configs with flat `kl_*` fields, so that they work from Python, YAML (`TrlParser`) and the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import trl

from kl_plugins.errors import refuse
from kl_plugins.hosts import require_tested
from kl_plugins.options import KLOptions, option
from kl_plugins.registry import get_loss
from kl_plugins.trl.sampling import sampling_problems
from kl_plugins.trl.seam import unclaimed_beta


@dataclass
class KLFields(KLOptions):
    """The KL options of `kl_plugins.KLSpec`, each with a `kl_` in front. `beta` keeps TRL's meaning.

    Raises, before any model is loaded: `UnknownLossError`, `ConfigError` (an option that doesn't exist, isn't used by
    the chosen configuration or contradicts TRL's; `beta=0`; a zero or biased gradient) or `PatchError` (a version of
    TRL that wasn't tested).
    """

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # the TRL config that this is mixed into
        self._none_from_words()
        if self.kl is None:
            refuse(self._options_without_kl())
            return
        require_tested("trl", vllm=bool(self.use_vllm))
        refuse([*self.spec_problems(), *self._contradictions()])
        self.beta = unclaimed_beta(self.beta)

    def to_dict(self) -> dict[str, Any]:
        """TRL's, for its logs and files: with `beta` as a plain number."""
        return super().to_dict() | {"beta": float(self.beta)}  # type: ignore[misc]

    def _options_without_kl(self) -> list[str]:
        changed = self.changed_kl_options()
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
                if name in self.changed_kl_options()
            ]
        return problems + ([] if self.kl_allow_biased else sampling_problems(self))


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

    kl_baseline: str | None = option(
        "auto", "leave_one_out, None, or auto: leave_one_out for the in-reward configurations, as RLOO does."
    )

    def kl_options(self) -> dict[str, Any]:
        """As everywhere, with `kl_baseline="auto"` resolved."""
        options = super().kl_options()
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
