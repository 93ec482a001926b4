"""What each KL configuration does to the gradient: one dict of frozen records.

Third parties register under the entry-point group `kl_plugins.losses`: the entry point names a `KLLoss`, or a class
or function that returns one when called without arguments. `kl_plugins.oracle.check_loss` proves or refutes what a
record declares.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING

from kl_plugins.core import estimators
from kl_plugins.errors import ConfigError, UnknownLossError, refuse

if TYPE_CHECKING:
    from torch import Tensor

ENTRY_POINT_GROUP = "kl_plugins.losses"
GRADIENTS = ("reverse_kl", "local_reverse_kl", "forward_kl", "local_forward_kl", "zero", "biased")
CREDITS = ("token", "to_go", "sequence")
REVERSE_KL = "reverse_kl"
"""What hosts take for `kl=`, to pick a configuration themselves (`integration.choice`): the name of none."""
EXACT = ("", "reverse_kl", "forward_kl")


@dataclass(frozen=True, kw_only=True)
class KLLoss:
    """One KL configuration, before any option is chosen.

    Raises `ConfigError` for a credit or gradient that doesn't exist, or a `default_credit` that isn't declared.
    """

    name: str
    """What the user writes: `kl="k2_as_loss"`."""
    summary: str
    """One sentence: what it does to the gradient."""
    value: Callable[[Tensor], Tensor]
    """Per-token KL estimate in nats, a pointwise function of `log_ratio`; only logged."""
    coefficient: Callable[[Tensor], Tensor]
    """Per-token coefficient of the score before credit is assigned, a pointwise function of `log_ratio`."""
    gradient_of: Mapping[str, str]
    """Credit -> the expected on-policy gradient, one of `GRADIENTS`. Its keys are the credits that are offered."""
    default_credit: str = "token"
    """The credit used when the user names none."""
    in_reward: bool = False
    """Whether it stands for a KL in the reward: hosts then give it the baseline that they give to rewards."""
    exact: str = ""
    """`"reverse_kl"` or `"forward_kl"`: summed over the vocabulary (`kl_plugins.exact_kl`), for which a host must give
    the full next-token distributions. `value` and `coefficient` are then those of a sampled token outside of `top_k`,
    and `to_go` sums the divergences of later positions. `""`: sampled."""
    may_overflow: bool = True
    """Whether the coefficient can leave float32's range, so that `coefficient_bound` has something to bound."""
    expected: str = ""
    """Where the gradient is zero or biased: what it is, in a formula."""
    instead: str = ""
    """Where the gradient is zero, biased or of another divergence: the nearest principled configuration."""
    source: str = "Liu et al., arXiv 2510.01555"
    """Where the configuration comes from."""

    def __post_init__(self) -> None:
        problems = [
            f"KL loss {self.name!r}: credit {credit!r} declares gradient_of={gradient!r}; credits are "
            f"{', '.join(CREDITS)} and gradients {', '.join(GRADIENTS)}"
            for credit, gradient in self.gradient_of.items()
            if credit not in CREDITS or gradient not in GRADIENTS
        ]
        if self.exact not in EXACT:
            problems.append(f"KL loss {self.name!r}: exact={self.exact!r}; choose from {', '.join(map(repr, EXACT))}")
        if self.exact and "sequence" in self.gradient_of:
            problems.append(f"KL loss {self.name!r}: what is exact has credit token or to_go, not sequence")
        if self.default_credit not in self.gradient_of:
            problems.append(f"KL loss {self.name!r}: default_credit={self.default_credit!r} has no gradient_of")
        refuse(problems)
        object.__setattr__(self, "gradient_of", MappingProxyType(dict(self.gradient_of)))


def _built_in(*losses: KLLoss) -> dict[str, KLLoss]:
    return {loss.name: loss for loss in losses}


LOSSES: dict[str, KLLoss] = _built_in(
    KLLoss(
        name="k1_in_reward",
        in_reward=True,
        summary="Reverse KL of whole sequences: every token pays for the log-ratios of all that follow it (to_go) or "
        "of the whole completion (sequence).",
        value=estimators.k1,
        coefficient=estimators.k1,
        gradient_of={"to_go": "reverse_kl", "sequence": "reverse_kl", "token": "local_reverse_kl"},
        default_credit="to_go",
        may_overflow=False,
        source="Liu et al., arXiv 2510.01555; Shah et al., arXiv 2512.21852; Tang and Munos, arXiv 2506.09477",
    ),
    KLLoss(
        name="k2_as_loss",
        summary="Reverse KL per token, on the states that were visited (on-policy the same as k1 in reward, "
        "credit token); with credit sequence, of whole sequences.",
        value=estimators.k2,
        coefficient=estimators.k1,
        gradient_of={"token": "local_reverse_kl", "sequence": "reverse_kl"},
        may_overflow=False,
    ),
    KLLoss(
        name="k3_as_loss",
        summary="Forward KL per token, KL(ref || policy): a first-order approximation of the reverse one, and "
        "unbounded where the policy has left the reference's tokens. What GRPO's paper uses.",
        value=estimators.k3,
        coefficient=estimators.k3_derivative,
        gradient_of={"token": "local_forward_kl"},
        instead="k2_as_loss",
        source="Shao et al., arXiv 2402.03300; Liu et al., arXiv 2510.01555",
    ),
    KLLoss(
        name="k1_as_loss",
        summary="Nothing: the expected gradient is zero, only noise is added.",
        value=estimators.k1,
        coefficient=estimators.k1_derivative,
        gradient_of={"token": "zero"},
        may_overflow=False,
        expected="E[grad log pi] = 0",
        instead="k2_as_loss",
    ),
    KLLoss(
        name="k2_in_reward",
        in_reward=True,
        summary="The gradient of another objective, E[sum of k2], less the local reverse KL.",
        value=estimators.k2,
        coefficient=estimators.k2,
        gradient_of={"to_go": "biased"},
        default_credit="to_go",
        may_overflow=False,
        expected="grad E[sum k2] - grad local reverse KL",
        instead="k1_in_reward",
    ),
    KLLoss(
        name="k3_in_reward",
        in_reward=True,
        summary="Reverse KL minus local forward KL: it can point away from the reference.",
        value=estimators.k3,
        coefficient=estimators.k3,
        gradient_of={"to_go": "biased"},
        default_credit="to_go",
        expected="grad reverse KL - grad local forward KL",
        instead="k1_in_reward",
    ),
    KLLoss(
        name="exact_as_loss",
        exact="reverse_kl",
        summary="Reverse KL per token, summed over the whole vocabulary: k2_as_loss without the noise of the sampled "
        "token.",
        value=estimators.k1,
        coefficient=estimators.k1_plus_one,
        gradient_of={"token": "local_reverse_kl"},
        may_overflow=False,
        source="Amini et al., arXiv 2504.10637; Tang and Munos, arXiv 2506.09477",
    ),
    KLLoss(
        name="exact_in_reward",
        exact="reverse_kl",
        in_reward=True,
        summary="Reverse KL of whole sequences: the KL of every token summed over the whole vocabulary, and every "
        "token pays for the KLs after it.",
        value=estimators.k1,
        coefficient=estimators.k1_plus_one,
        gradient_of={"to_go": "reverse_kl", "token": "local_reverse_kl"},
        default_credit="to_go",
        may_overflow=False,
        source="Amini et al., arXiv 2504.10637; Tang and Munos, arXiv 2506.09477",
    ),
    KLLoss(
        name="exact_forward_as_loss",
        exact="forward_kl",
        summary="Forward KL per token, KL(ref || policy), summed over the whole vocabulary, on the states that the "
        "policy visits: k3_as_loss without its noise, and bounded.",
        value=estimators.forward_k1,
        coefficient=estimators.forward_tail_coefficient,
        gradient_of={"token": "local_forward_kl"},
        may_overflow=False,
        instead="exact_as_loss",
        source="Amini et al., arXiv 2504.10637; Liu et al., arXiv 2510.01555",
    ),
)

BUILT_IN = frozenset(LOSSES)


def get_loss(name: str) -> KLLoss:
    """The record registered as `name`: built in, or of an installed third party.

    Raises `UnknownLossError` (with the closest names), or `ConfigError` if a third party's entry is unusable or claims
    a name that is taken.
    """
    found = list(_third_party(tuple(sys.path)).select(name=name))
    if not found and name not in LOSSES:  # its package may have been installed since
        _third_party.cache_clear()
        found = list(_third_party(tuple(sys.path)).select(name=name))
    if len(found) + (name in BUILT_IN) > 1:
        claims = ", ".join([*(["kl_plugins itself"] if name in BUILT_IN else []), *(entry.value for entry in found)])
        raise ConfigError(f"KL loss {name!r} is registered more than once, by {claims}: rename or uninstall one")
    if found and name not in LOSSES:
        register(_load(found[0]))
    if name == REVERSE_KL:
        raise UnknownLossError(
            f"{name!r} names a divergence, of which a host picks the configuration (GRPOConfig(kl={name!r})): name "
            "one here, such as 'k1_in_reward'"
        )
    if name not in LOSSES:
        known = sorted({*LOSSES, *third_party_names()})
        close = get_close_matches(str(name), [*known, REVERSE_KL], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UnknownLossError(f"unknown KL loss {name!r}: {hint}known are {', '.join(known)}")
    return LOSSES[name]


def all_losses() -> dict[str, KLLoss]:
    """Every usable record by name, third parties' included.

    Raises `ConfigError` if one of theirs is unusable.

    Example:
        >>> [name for name, loss in all_losses().items() if "forward" in loss.gradient_of.get("token", "")]
        ['k3_as_loss', 'exact_forward_as_loss']
    """
    return {name: get_loss(name) for name in (*LOSSES, *sorted(third_party_names() - set(LOSSES)))}


def third_party_names() -> set[str]:
    """What installed packages register under `kl_plugins.losses`, without importing any of it."""
    return set(_third_party(tuple(sys.path)).names)


@cache
def _third_party(path: tuple[str, ...]) -> EntryPoints:
    """What the packages on `path`, which is `sys.path`, register: to read it takes 7 ms, and every spec asks."""
    return entry_points(group=ENTRY_POINT_GROUP)


def register(loss: KLLoss) -> KLLoss:
    """Add a record for this process, so that `kl="its_name"` can be written in every host.

    Raises `ConfigError` if the name is taken by another one. Returns the record.

    Example:
        >>> half = KLLoss(
        ...     name="half_k1_in_reward",
        ...     summary="Half the local reverse KL.",
        ...     value=lambda log_ratio: log_ratio / 2,
        ...     coefficient=lambda log_ratio: log_ratio / 2,
        ...     gradient_of={"token": "biased"},
        ... )
        >>> register(half) is get_loss("half_k1_in_reward")
        True
        >>> del LOSSES["half_k1_in_reward"]
    """
    if loss.name == REVERSE_KL or LOSSES.setdefault(loss.name, loss) is not loss:
        raise ConfigError(f"KL loss {loss.name!r} is already registered: choose another name")
    return loss


def _load(entry_point: EntryPoint) -> KLLoss:
    try:
        found = entry_point.load()
    except ImportError as error:
        raise ConfigError(
            f"entry point {entry_point.name!r} ({entry_point.value}) can't be imported: {error}"
        ) from error
    loss = found() if callable(found) else found
    if not isinstance(loss, KLLoss):
        raise ConfigError(
            f"entry point {entry_point.name!r} ({entry_point.value}) gave a {type(loss).__name__}: it must name a "
            "kl_plugins.KLLoss, or a class or function that returns one"
        )
    if loss.name != entry_point.name:
        raise ConfigError(
            f"entry point {entry_point.name!r} ({entry_point.value}) gave the KL loss {loss.name!r}: make them equal"
        )
    return loss
