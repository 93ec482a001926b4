"""TRL's configs with flat `kl_*` fields, so that they work from Python, YAML (`TrlParser`) and the command line."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import trl

from kl_plugins.errors import refuse
from kl_plugins.integration.options import KLOptions, ReferenceOptions, RLOOOptions
from kl_plugins.integration.problem import Problem, refuse_problems
from kl_plugins.integration.rules_trl import grpo_problems, rloo_problems
from kl_plugins.patching import check, load_patches, untested_allowed
from kl_plugins.trl.host_beta import guarded_beta

Config = TypeVar("Config", bound=type)
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
        if self.kl is not None:
            self._check_host()
        refuse([NO_KL] if self.kl is None and self.kl_required else [])
        refuse_problems(self._problems(), allow_biased=self.kl_allow_biased)
        if self.kl is not None:
            setattr(self, self.kl_beta_field, self._guarded(getattr(self, self.kl_beta_field)))

    def to_dict(self) -> dict[str, Any]:
        """TRL's options and ours, for its logs and files: what `kl` picked, and the coefficient as a plain number."""
        options: dict[str, Any] = super().to_dict()  # type: ignore[misc]  # TRL's
        if self.kl is not None:
            choice = self.kl_choice()
            options |= {"kl": choice.kl, **choice.options}
        return options | {self.kl_beta_field: float(getattr(self, self.kl_beta_field))}

    def _check_host(self) -> None:
        """Raise `PatchError` unless the installed TRL is one that was tested."""
        raise NotImplementedError

    def _guarded(self, beta: float) -> float:
        """`beta`, such that TRL's own KL raises where it would use it."""
        raise NotImplementedError

    def _problems(self) -> Iterator[Problem]:
        """What is wrong with the configuration, by the rules of its trainer."""
        raise NotImplementedError


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
    """TRL's trainer."""
    config: type
    """TRL's config of it."""
    our_trainer: type
    """Derived from `methods` and, behind them, from `trainer`."""
    our_config: type
    """Derived from `fields` and, behind them, from `config`."""
    methods: type
    """The mixin with our methods, which goes in front of TRL's trainer."""
    fields: type[KLConfigMixin]
    """The mixin with our options, which goes in front of TRL's config."""


@dataclass
class OnlineFields(ReferenceOptions, KLConfigMixin):
    """What the configs of GRPO, GMPO and RLOO have besides TRL's fields; TRL's `beta` is the coefficient of the KL."""

    kl_part = ""
    """The part of `patches/trl.toml` that the trainer relies on."""

    def _check_host(self) -> None:
        config: Any = self  # with TRL's own options
        more = {"vllm": config.use_vllm, "exact": self.kl_loss.exact}
        check_trl(*self.kl_part.split(), *(part for part, needed in more.items() if needed))

    def _guarded(self, beta: float) -> float:
        return guarded_beta(beta)


@dataclass
class GRPOFields(OnlineFields):
    """`OnlineFields` for `trl.GRPOConfig`."""

    kl_part = "grpo"

    def _problems(self) -> Iterator[Problem]:
        return grpo_problems(self, kl_in_liger_loss=self._kl_in_liger_loss())

    def _kl_in_liger_loss(self) -> bool:
        """Whether `use_liger_kernel` makes the installed TRL, whatever its version, compute a loss with its own KL."""
        config: Any = self  # with TRL's own options; its trainer is only loaded if need be
        return bool(config.use_liger_kernel) and hasattr(trl.GRPOTrainer, "compute_liger_loss")


@dataclass
class RLOOFields(RLOOOptions, OnlineFields):
    """`OnlineFields` for `trl.RLOOConfig`."""

    kl_part = "rloo"

    def _problems(self) -> Iterator[Problem]:
        return rloo_problems(self)


def documented(config: Config) -> Config:
    """Add the `kl_*` fields of a config, from their help texts, and what it raises to its docstring, as TRL has it."""
    lines = ["    Parameters:", "        > Parameters that control the KL to the reference", ""]
    for f in fields(config):
        if f.name == "kl" or (f.name.startswith("kl_") and "default" in f.metadata):
            default = f.default_factory() if callable(f.default_factory) else f.default
            shown = f'"{default}"' if isinstance(default, str) else repr(default)
            kind = str(f.type).removesuffix(" | None")
            optional = "*optional*" if default is None else f"*optional*, defaults to `{shown}`"
            lines.append(f"        {f.name} (`{kind}`, {optional}):")
            lines.append(textwrap.fill(f.metadata["help"], 119, initial_indent=" " * 12, subsequent_indent=" " * 12))
    config.__doc__ = "\n".join([config.__doc__ or "", "", *lines, "", *_RAISES, "    "])
    return config


_RAISES = """\
    Raises, before any model is loaded:
        `ConfigError`: an option that doesn't exist, isn't used by the chosen configuration or contradicts TRL's; a
            coefficient that isn't positive; a zero or biased gradient. All problems at once.
        `UnknownLossError`: nobody registered `kl`.
        `PatchError`: a TRL that wasn't tested.""".splitlines()


@documented
@dataclass
class GRPOConfig(GRPOFields, trl.GRPOConfig):
    """[`trl.GRPOConfig`] with the KL that `kl` names; without one it is TRL's own."""


@documented
@dataclass
class RLOOConfig(RLOOFields, trl.RLOOConfig):
    """[`trl.RLOOConfig`] with the KL that `kl` names; without one it is TRL's own."""
