"""TRL's configs with flat `kl_*` fields, so that they work from Python, YAML (`TrlParser`) and the command line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import trl

from kl_plugins.core.registry import get_loss
from kl_plugins.options import ReferenceOptions, option
from kl_plugins.trl.fields import KLFields, check_trl
from kl_plugins.trl.sampling import sampling_problems
from kl_plugins.trl.seam import unclaimed_beta


@dataclass
class OnlineFields(ReferenceOptions, KLFields):
    """The KL options of `kl_plugins.KLSpec`, each with a `kl_` in front. `beta` keeps TRL's meaning.

    Raises, before any model is loaded: `UnknownLossError`, `ConfigError` (an option that doesn't exist, isn't used by
    the chosen configuration or contradicts TRL's; `beta=0`; a zero or biased gradient) or `PatchError` (a TRL that
    wasn't tested).
    """

    kl_part = ""
    """The part of `patches/trl.toml` that the trainer relies on."""

    def changed_kl_options(self) -> list[str]:
        """The options that are not at the default of this package."""
        return [*super().changed_kl_options(), *self.changed_reference_options()]

    def _none_from_words(self) -> None:
        super()._none_from_words()
        if str(self.kl_reference).lower() in ("none", "null"):
            self.kl_reference = None

    def _check_host(self) -> None:
        more = {"vllm": self.use_vllm, "exact": get_loss(str(self.kl)).exact}
        check_trl(*self.kl_part.split(), *(part for part, needed in more.items() if needed))

    def _claimed(self, beta: float) -> float:
        return unclaimed_beta(beta)

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if self.kl_clip == "combined":
            for name in ("kl_clip_epsilon", "kl_weight_clip", "kl_weight_clip_mode"):
                if name in self.changed_kl_options():
                    yield (
                        f"{name}={getattr(self, name)!r} is not used with kl_clip='combined', where TRL's own ratio "
                        "and epsilon apply to the KL: leave it out"
                    )
        yield from self.reference_problems()
        if self.sync_ref_model and self.changed_reference_options():
            yield "sync_ref_model=True moves TRL's own reference: use kl_reference_every and kl_reference_decay"
        if get_loss(str(self.kl)).exact:
            if self.kl_top_k is not None:
                yield (
                    f"kl_top_k={self.kl_top_k}: TRL's trainers sum over the whole vocabulary, in tiles, which costs "
                    "no more than a head of it: leave it out"
                )
            moving = "sync_ref_model" if self.sync_ref_model else "kl_reference_every"
            if self.sync_ref_model or self.kl_reference_every is not None:
                yield (
                    f"{moving}={getattr(self, moving)} changes the reference between a rollout and its use, but "
                    f"kl={self.kl!r} keeps its hidden states from the rollout: leave it out, or use k1_in_reward or "
                    "k2_as_loss"
                )
        if not self.kl_allow_biased:
            yield from sampling_problems(self)


@dataclass
class GRPOFields(OnlineFields):
    """`OnlineFields` for `trl.GRPOConfig`."""

    kl_part = "grpo"

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if self.use_liger_kernel and hasattr(trl.GRPOTrainer, "compute_liger_loss"):  # until 1.13
            yield "use_liger_kernel=True: this TRL then computes its loss with its own KL in it; leave it out"
        if not self.use_bias_correction_kl:
            yield "use_bias_correction_kl=False is about TRL's own KL, which kl replaces: use kl_off_policy"
        if self.kl_clip == "combined":
            for name, neutral in (("off_policy_mask_threshold", None), ("top_entropy_quantile", 1.0)):
                if getattr(self, name) != neutral:
                    yield (
                        f"{name}={getattr(self, name)!r} masks tokens of the policy loss, and with kl_clip='combined' "
                        "their KL with them: use kl_clip='separate' or None"
                    )


@dataclass
class RLOOFields(OnlineFields):
    """`OnlineFields` for `trl.RLOOConfig`."""

    kl_part = "rloo"
    kl_baseline: str | None = option(
        "auto", "leave_one_out, None, or auto: leave_one_out for the in-reward configurations, as RLOO does."
    )

    def kl_options(self) -> dict[str, Any]:
        """As everywhere, with `kl_baseline="auto"` resolved."""
        options = super().kl_options()
        if options["kl_baseline"] == "auto" and self.kl is not None:
            options["kl_baseline"] = "leave_one_out" if get_loss(self.kl).in_reward else None
        return options

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if self.kl_clip == "combined" and self.kl_credit != "sequence":
            yield (
                f"kl_clip='combined' with kl_credit={self.kl_credit!r}: RLOO's advantage is one number a sequence; "
                "use kl_credit='sequence', or kl_clip='separate'"
            )
        if self.kl_clip == "combined" and set(self.kl_leave_out) - {"first"}:
            yield (
                f"kl_clip='combined' with kl_leave_out={self.kl_leave_out}: RLOO's advantage is one number a "
                "sequence, but a left-out token has a coefficient of its own; use kl_clip='separate' or None"
            )


@dataclass
class GRPOConfig(GRPOFields, trl.GRPOConfig):
    """[`trl.GRPOConfig`] with the options of `OnlineFields`, and what those raise."""


@dataclass
class RLOOConfig(RLOOFields, trl.RLOOConfig):
    """[`trl.RLOOConfig`] with the options of `OnlineFields`, and what those raise."""
