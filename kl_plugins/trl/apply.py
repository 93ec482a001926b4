"""`apply_to_trl`: the KL for scripts that keep TRL's own imports, and for TRL's command line.

TRL's classes stay the objects that they are, so that it doesn't matter who imported them when, or derives from them.
The `__init__` of its trainers is replaced (`patches/trl.toml`, the parts `apply_*`): a trainer that is made with `kl`
set gets the methods of `kl_plugins.trl` in front of its own. Its configs get the `kl_*` fields.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any, get_type_hints

from transformers.utils import logging

from kl_plugins.errors import PatchError, refuse
from kl_plugins.hosts import installed_version
from kl_plugins.options import KLOptions
from kl_plugins.patchfile import load_patches, refuse_all
from kl_plugins.patching import Binding, Patching, untested_allowed
from kl_plugins.trl.fields import Hook, KLFields

logger = logging.get_logger(__name__)

# In the order in which they are asked whose trainer it is: GMPO's is a GRPOTrainer, too.
# name -> TRL's module, and the parts of patches/trl.toml.
TRAINERS = {
    "gmpo": ("trl.experimental.gmpo", ("grpo", "gmpo", "apply_grpo")),
    "grpo": ("trl.trainer.grpo_trainer", ("grpo", "apply_grpo")),
    "rloo": ("trl.trainer.rloo_trainer", ("rloo", "apply_rloo")),
    "ppo": ("trl.experimental.ppo", ("ppo", "apply_ppo")),
}
_applied: AppliedToTRL | None = None


def apply_to_trl(*, trainers: Sequence[str] | None = None, require_kl: bool = False, **options: Any) -> AppliedToTRL:
    """Let TRL's own `GRPOTrainer`, `RLOOTrainer`, `GMPOTrainer` and `PPOTrainer` train with the KL that is named.

    ```python
    kl_plugins.apply_to_trl(kl="k2_as_loss")  # before or after `from trl import GRPOConfig, GRPOTrainer`
    ```

    From then on TRL's own configs have the `kl_*` fields, with `options` as their defaults, in Python, YAML and on
    the command line, and its own trainers, and classes that derive from them, use them. `GRPOConfig(kl=None)` leaves
    a trainer as it is. Says on stderr what it did. A second call with the same arguments does nothing more.

    Args:
        trainers: Of "grpo", "rloo", "gmpo" and "ppo"; by default all that the installed TRL has.
        require_kl: Refuse configs without a `kl`.
        options: Defaults of the `kl_*` fields (`kl_plugins.trl.GRPOConfig`).

    Returns:
        What was applied: `undo()` it, or use it as a context manager. Trainers made meanwhile keep their KL.

    Raises:
        UnknownLossError, ConfigError: For options that can't be, here; for those that contradict a config, there.
        PatchError: For a TRL that isn't as it was tested, or if it was applied with other options. Nothing is changed.
    """
    global _applied
    asked = AppliedToTRL(trainers, require_kl, options)
    if _applied is not None:
        if _applied.arguments != asked.arguments:
            raise PatchError(
                f"apply_to_trl was asked for {asked.arguments}, but is in force with {_applied.arguments}: undo() that"
            )
        return _applied
    asked.apply()
    _applied = asked
    return asked


class AppliedToTRL:
    """What `apply_to_trl` did in this process."""

    def __init__(self, trainers: Sequence[str] | None, require_kl: bool, options: dict[str, Any]) -> None:
        known = [name for name, (module, _) in TRAINERS.items() if _exists(module)]
        chosen = known if trainers is None else list(trainers)
        refuse([f"trainers={name!r}: this TRL has {', '.join(sorted(known))}" for name in chosen if name not in known])
        self.arguments = {"trainers": sorted(chosen), "require_kl": require_kl, **options}
        self.options = options
        self.hooks: list[Hook] = []
        self._chosen = [name for name in TRAINERS if name in chosen]
        self._configs: list[_ConfigWithFields] = []
        parts = dict.fromkeys(part for name in self._chosen for part in TRAINERS[name][1])
        patches = load_patches("trl", *parts)
        self._patching = Patching(patches, owner="kl_plugins.apply_to_trl", allow_untested=untested_allowed())

    def apply(self) -> None:
        """Change TRL's classes, or raise and change none."""
        self._patching.apply()  # checks the version first
        try:
            self.hooks = [import_module(f"kl_plugins.trl.{name}").HOOK for name in self._chosen]
            self._check_options()
            for hook in self.hooks:
                self._configs.append(_ConfigWithFields(hook, self))
        except BaseException:
            self._restore()
            raise
        names = ", ".join(sorted(hook.trainer.__name__ for hook in self.hooks))
        default = f"by default {self.options}" if self.options else "and none is set"
        logger.warning(
            f"kl_plugins: TRL {installed_version('trl')}'s own {names} and their configs take kl_* options, {default}"
        )

    def undo(self) -> None:
        """Put TRL's own objects back; trainers that were made meanwhile keep their KL.

        Raises `PatchError` for what somebody else has replaced since, and leaves that as it is.
        """
        global _applied
        if _applied is not self:
            return
        self._restore()
        _applied = None

    def _restore(self) -> None:
        problems = [problem for config in reversed(self._configs) if (problem := config.undo())]
        try:
            self._patching.undo()
        except PatchError as error:
            problems.append(str(error))
        refuse_all("TRL can't be restored", problems)

    def bindings(self) -> list[Binding]:
        """What is replaced in this process, and how often it was called."""
        return self._patching.bindings()

    def __enter__(self) -> AppliedToTRL:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.undo()

    def options_of(self, hook: Hook) -> dict[str, Any]:
        """Those of the options that a config of this trainer has."""
        return {name: value for name, value in self.options.items() if name in _fields_of(hook)}

    def config(self, hook: Hook, given: Any) -> Any:
        """The config of a trainer: as given, if it has the fields; else a copy with the options in it."""
        if not isinstance(given, KLFields) and self.options.get("kl") is not None:
            given = _with_fields(hook, given, self.options_of(hook))
        if self.require_kl and getattr(given, "kl", None) is None:
            refuse([NO_KL])
        return given

    @property
    def require_kl(self) -> bool:
        """Whether configs without a `kl` are refused."""
        return bool(self.arguments["require_kl"])

    def _check_options(self) -> None:
        known = {name for hook in self.hooks for name in _fields_of(hook)}
        problems = []
        for name in self.options.keys() - known:
            close = get_close_matches(name, known, n=1)
            problems.append(
                f"{name} is no option of {', '.join(self._chosen)}" + f"; did you mean {close[0]}?" * bool(close)
            )
        refuse(problems)
        shared = {f.name for f in fields(KLOptions)} & self.options.keys() - {"kl_baseline"}
        KLOptions(**{name: self.options[name] for name in shared}).kl_spec()


NO_KL = "no KL was named: add kl=... (--kl NAME), or start TRL itself to train with its own"


def with_kl(init: Callable[..., None]) -> Callable[..., None]:
    """What takes the place of the `__init__` of one of TRL's trainers."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        applied = _applied
        hook = next((each for each in applied.hooks if isinstance(self, each.trainer)), None) if applied else None
        if applied is None or hook is None or isinstance(self, hook.methods):
            init(self, *args, **kwargs)
            return
        bound = signature.bind(self, *args, **kwargs)
        if bound.arguments.get("args") is not None:
            bound.arguments["args"] = applied.config(hook, bound.arguments["args"])
        init(*bound.args, **bound.kwargs)
        if getattr(self.args, "kl", None) is not None:
            cls = type(self)
            self.__class__ = hook.our_trainer if cls is hook.trainer else _derived(hook.methods, cls)
            self.start_kl()
            gradient = f"its expected on-policy gradient is {self.kl_spec.gradient_of}"
            logger.warning(f"kl_plugins: this {cls.__name__} trains with {self.kl_spec.name}; {gradient}")

    return __init__


class _ConfigWithFields:
    """One of TRL's config classes with the `kl_*` fields, in place, until it is undone."""

    def __init__(self, hook: Hook, applied: AppliedToTRL) -> None:
        self.config = hook.config
        names = ("__init__", "__dataclass_fields__", "__annotations__")
        self._own = {name: vars(self.config)[name] for name in names if name in vars(self.config)}
        own_init, options = self._own["__init__"], applied.options_of(hook)

        @functools.wraps(hook.our_config.__init__)  # type: ignore[misc]
        def __init__(config: Any, *args: Any, **kwargs: Any) -> None:
            if type(config) is not self.config:  # a class that derives from it without being a dataclass
                own_init(config, *args, **kwargs)
                return
            config.__class__ = hook.our_config
            config.__init__(*args, **options | kwargs)
            if applied.require_kl and config.kl is None:
                refuse([NO_KL])

        hints = get_type_hints(hook.our_config)
        added = {f.name: _with_default(f, options) for f in _fields_of(hook).values()}
        self._ours = {
            "__init__": __init__,
            "__dataclass_fields__": {**vars(hook.our_config)["__dataclass_fields__"], **added},
            "__annotations__": {**self._own.get("__annotations__", {}), **{name: hints[name] for name in added}},
        }
        for name, value in self._ours.items():
            setattr(self.config, name, value)

    def undo(self) -> str:
        """Put TRL's own back; if something else is there, leave it and say so. Done once, it does nothing more."""
        now = {name: vars(self.config).get(name) for name in self._ours}
        if all(now[name] is self._own.get(name) for name in now):
            return ""
        if any(now[name] is not value for name, value in self._ours.items()):
            return f"{self.config.__module__}:{self.config.__name__} was changed by somebody else: undo that first"
        for name in self._ours:
            if name in self._own:
                setattr(self.config, name, self._own[name])
            else:
                delattr(self.config, name)
        return ""


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def _fields_of(hook: Hook) -> dict[str, Field]:
    return {f.name: f for f in fields(hook.fields)}  # type: ignore[arg-type]


def _with_default(field: Field, options: dict[str, Any]) -> Field:
    field = copy.copy(field)
    if field.name in options:
        value = options[field.name]
        field.default, field.default_factory = (
            (MISSING, lambda: value) if isinstance(value, list) else (value, MISSING)
        )
    return field


def _with_fields(hook: Hook, config: Any, options: dict[str, Any]) -> Any:
    """A copy of a config that has no `kl_*` fields, with them."""
    config = copy.copy(config)
    cls = type(config)
    config.__class__ = hook.our_config if cls is hook.config else _derived(hook.fields, cls)
    for f in map(functools.partial(_with_default, options=options), _fields_of(hook).values()):
        setattr(config, f.name, f.default_factory() if callable(f.default_factory) else f.default)
    config.check_kl()
    return config


_DERIVED: dict[tuple[Any, Any], type] = {}


def _derived(first: type, cls: type) -> type:
    """A class of the same name as `cls`, with the methods of `first` in front of it."""
    if (first, cls) not in _DERIVED:
        names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        _DERIVED[first, cls] = type(cls)(cls.__name__, (first, cls), names | {"__reduce__": _reduce})
    return _DERIVED[first, cls]


def _reduce(self: Any) -> tuple[Any, ...]:
    """Saves an object of a class that `_derived` made (TRL saves its configs) with the two that it was made of."""
    first, cls = type(self).__bases__
    return _restored, (first, cls, self.__dict__)


def _restored(first: type, cls: type, state: dict[str, Any]) -> Any:
    self: Any = object.__new__(_derived(first, cls))
    self.__dict__.update(state)
    return self
