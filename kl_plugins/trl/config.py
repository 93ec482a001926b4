"""TRL's configs with flat `kl_*` fields, so that they work from Python, YAML (`TrlParser`) and the command line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import trl

from kl_plugins.core.registry import get_loss
from kl_plugins.errors import refuse
from kl_plugins.integration.options import KLOptions, ReferenceOptions, option
from kl_plugins.integration.sampling import sampling_problems
from kl_plugins.patching import check, load_patches, untested_allowed
from kl_plugins.trl.host_beta import guarded_beta

NO_KL = "no KL was named: add kl=... (--kl NAME), or start TRL itself to train with its own"


class KLConfigMixin(KLOptions):
    """Mixed into a config of TRL, in front of TRL's own class."""

    kl_beta_field = "beta"
    """TRL's name for the coefficient of the KL."""
    kl_required = False
    """Whether `kl=None` is refused."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # TRL's
        self.check_kl()

    def check_kl(self) -> None:
        """Refuse, before any model is loaded, what can't be trained as it is asked for; see the configs."""
        self._none_from_words()
        if self.kl is None:
            refuse([NO_KL] if self.kl_required else [])
            defaults = {
                f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(self)
            }
            changed = [name for name in self.changed_kl_options() if getattr(self, name) != defaults[name]]
            refuse([f"{', '.join(changed)} set, but kl is None: name a configuration with kl=..."] if changed else [])
            return
        self._check_host()
        refuse([*self.spec_problems(), *self._contradictions()])
        setattr(self, self.kl_beta_field, self._guarded(getattr(self, self.kl_beta_field)))

    def to_dict(self) -> dict[str, Any]:
        """TRL's, for its logs and files: with the coefficient as a plain number."""
        return super().to_dict() | {self.kl_beta_field: float(getattr(self, self.kl_beta_field))}  # type: ignore[misc]

    def _check_host(self) -> None:
        """Raise `PatchError` unless the installed TRL is one that was tested."""
        raise NotImplementedError

    def _guarded(self, beta: float) -> float:
        """`beta`, such that TRL's own KL raises where it would use it."""
        raise NotImplementedError

    def _contradictions(self) -> Iterator[str]:
        """What of TRL's own fields contradicts the KL that was asked for."""
        name = self.kl_beta_field
        beta = getattr(self, name)
        if not 0 < beta < math.inf:
            yield f"kl={self.kl!r} with {name}={beta:g}: set a positive finite {name}, or kl=None"
        else:
            yield from self.controller_problems(float(beta))


def check_trl(*parts: str) -> None:
    """Raise `PatchError` unless what `parts` of `patches/trl.toml` rely on is in the installed TRL as it was tested.

    `KL_PLUGINS_ALLOW_UNTESTED=1` accepts a version that was not tested, with a logged warning, as long as each of
    these functions is as it was in one that was.
    """
    check(load_patches("trl", *parts), allow_untested=untested_allowed())


@dataclass(frozen=True, kw_only=True)
class TrainerPair:
    """A trainer of TRL, its config, and what `apply_to_trl` gives them. Each adapter module declares its own."""

    trainer: type
    """TRL's."""
    config: type
    """TRL's."""
    our_trainer: type
    """`methods` in front of `trainer`."""
    our_config: type
    """`fields` in front of `config`."""
    methods: type
    """What is in front."""
    fields: type[KLConfigMixin]
    """What is in front."""


@dataclass
class OnlineFields(ReferenceOptions, KLConfigMixin):
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

    def _guarded(self, beta: float) -> float:
        return guarded_beta(beta)

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
