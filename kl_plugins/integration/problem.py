"""`Problem`: what is wrong with a configuration, and its remedy as data. The rules yield them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

from kl_plugins.errors import refuse
from kl_plugins.integration.options import ALLOW_BIASED

WAIVER = f", or pass {ALLOW_BIASED}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration."""

    says: str
    """What was asked, what was found and what to do."""
    change: Mapping[str, Any] = field(default_factory=dict)
    """The options that mend it, by the names under which the user gives them; None leaves an option out."""
    biases: bool = False
    """Whether it only biases the gradient, so that `kl_allow_biased` lets it through."""

    @property
    def refusal(self) -> str:
        """What is said where it is refused: `says`, and `kl_allow_biased` where that lets it through."""
        return self.says + (WAIVER if self.biases else "")


def refuse_problems(problems: Iterable[Problem], *, allow_biased: bool) -> None:
    """Raise a `ConfigError` with all `problems` that `allow_biased` doesn't let through; return if none are left."""
    refuse([problem.refusal for problem in problems if not (problem.biases and allow_biased)])


def with_remedies(
    settings: Any, messages: Callable[[Any], Sequence[str]], changes: Iterable[Mapping[str, Any]]
) -> Iterator[Problem]:
    """What `messages(settings)` says, each with the first of `changes` after which it isn't said any more.

    For the messages of the core, which come without a remedy as data. `settings` is a dataclass of options.
    """
    said = messages(settings)
    tried = [(change, messages(changed(settings, change))) for change in (changes if said else ())]
    for says in said:
        mends = (change for change, still in tried if says not in still and len(still) < len(said))
        yield Problem(says, next(mends, {}))


def changed(settings: Any, change: Mapping[str, Any]) -> Any:
    """A copy of `settings` with the options of `change`; None is what an option is by default."""
    defaults = {f.name: f.metadata["default"] for f in fields(settings) if "default" in f.metadata}
    made = copy(settings)
    for name, value in change.items():
        setattr(made, name, defaults.get(name) if value is None else value)
    return made
