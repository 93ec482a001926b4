"""What the KL options in every config of TRL have in common: when they are checked, and against what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from kl_plugins.errors import refuse
from kl_plugins.options import KLOptions
from kl_plugins.patching import check, load_patches, untested_allowed

NO_KL = "no KL was named: add kl=... (--kl NAME), or start TRL itself to train with its own"


class KLFields(KLOptions):
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
        setattr(self, self.kl_beta_field, self._claimed(getattr(self, self.kl_beta_field)))

    def to_dict(self) -> dict[str, Any]:
        """TRL's, for its logs and files: with the coefficient as a plain number."""
        return super().to_dict() | {self.kl_beta_field: float(getattr(self, self.kl_beta_field))}  # type: ignore[misc]

    def _check_host(self) -> None:
        """Raise `PatchError` unless the installed TRL is one that was tested."""
        raise NotImplementedError

    def _claimed(self, beta: float) -> float:
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
class Hook:
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
    fields: type[KLFields]
    """What is in front."""
