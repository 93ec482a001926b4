"""`apply_to_trl`: the KL for scripts that keep TRL's own imports, and for TRL's command line.

In TRL's modules the names of its trainers and configs are given to the classes of `kl_plugins.trl`, which derive from
them: `from trl import GRPOTrainer` gets ours from then on. So that nothing slips through, the `__init__` of TRL's own
trainers (`patches/trl.toml`, the parts `apply_*`) refuses to make one that was imported before. The modules that
define them stay as they are: their digests are checked there, and by these names they are pickled.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields, make_dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from types import ModuleType, TracebackType
from typing import Any, get_type_hints

from transformers.utils import logging

from kl_plugins.errors import PatchError, refuse
from kl_plugins.integration.options import KLOptions, without_words
from kl_plugins.patching import Binding, Patching, load_patches, untested_allowed
from kl_plugins.patching.versions import installed_version
from kl_plugins.trl.config import NO_KL, KLConfigMixin, TrainerPair

logger = logging.get_logger(__name__)

# name -> TRL's module, and the parts of patches/trl.toml. In the order in which they are asked whose trainer it is:
# GMPO's is a GRPOTrainer, too.
TRAINERS = {
    "gmpo": ("trl.experimental.gmpo", ("grpo", "gmpo", "apply_grpo")),
    "grpo": ("trl.trainer.grpo_trainer", ("grpo", "apply_grpo")),
    "rloo": ("trl.trainer.rloo_trainer", ("rloo", "apply_rloo")),
    "ppo": ("trl.experimental.ppo", ("ppo", "apply_ppo")),
}
_applied: AppliedToTRL | None = None
_lock = threading.RLock()


def apply_to_trl(*, trainers: Sequence[str] | None = None, require_kl: bool = False, **options: Any) -> AppliedToTRL:
    """Let `from trl import GRPOConfig, GRPOTrainer` get trainers with the KL that is named, and RLOO, GMPO and PPO.

    ```python
    kl_plugins.apply_to_trl(kl="k2_as_loss")  # before anything is imported from trl
    from trl import GRPOConfig, GRPOTrainer
    ```

    TRL's names stand for the classes of `kl_plugins.trl` from then on, with `options` as the defaults of the `kl_*`
    fields of the configs, in Python, YAML and on the command line. `GRPOConfig(kl=None)` is TRL's own. A class that
    was imported or derived before, or imported from the very module that defines it (`trl.trainer.grpo_trainer`), is
    refused when a trainer is made. Says on stderr what it did. A second call with the same arguments does nothing
    more, and takes one more `undo`.

    Args:
        trainers: Of "grpo", "rloo", "gmpo" and "ppo"; by default all that the installed TRL has.
        require_kl: Refuse trainers without a `kl`.
        options: Defaults of the `kl_*` fields (`kl_plugins.trl.GRPOConfig`).

    Returns:
        What was applied: `undo()` it, or use it as a context manager. Trainers made meanwhile keep their KL.

    Raises:
        UnknownLossError, ConfigError: For options that can't be, here; for those that contradict a config, there.
        PatchError: For a TRL that isn't as it was tested, or if it was applied with other options. Nothing is changed.
    """
    global _applied
    with _lock:
        asked = AppliedToTRL(trainers, require_kl, options)
        if _applied is None:
            asked._apply()
            _applied = asked
        elif _applied.arguments != asked.arguments:
            raise PatchError(
                f"apply_to_trl was asked for {asked.arguments}, but is in force with {_applied.arguments}: undo() that"
            )
        elif _applied.times == 0:
            raise PatchError(
                "apply_to_trl is half undone, since undo() met what somebody else had replaced: see there"
            )
        _applied.times += 1
        return _applied


def in_force() -> AppliedToTRL | None:
    """What `apply_to_trl` did in this process, if it wasn't undone."""
    return _applied


class AppliedToTRL:
    """What `apply_to_trl` did in this process."""

    def __init__(self, trainers: Sequence[str] | None, require_kl: bool, options: dict[str, Any]) -> None:
        known = [name for name, (module, _) in TRAINERS.items() if _exists(module)]
        chosen = known if trainers is None else [trainers] if isinstance(trainers, str) else list(trainers)
        self.trainers = [name for name in known if name in chosen]
        wrong = [f"trainers={name!r}: this TRL has {', '.join(sorted(known))}" for name in chosen if name not in known]
        refuse(wrong or ([] if chosen else ["trainers=[] are none: leave it out for all"]))
        self.require_kl = require_kl
        self.options = without_words(
            {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        )
        self.times = 0
        """How often it was asked for, less how often it was undone."""
        self.pairs: dict[str, TrainerPair] = {}
        self._names: dict[type, type] = {}  # TRL's class -> ours
        parts = dict.fromkeys(part for name in self.trainers for part in TRAINERS[name][1])
        self._patching = Patching(
            load_patches("trl", *parts), owner="kl_plugins.apply_to_trl", allow_untested=untested_allowed()
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `apply_to_trl`, the trainers by name."""
        return {"trainers": self.trainers, "require_kl": self.require_kl, **self.options}

    def _apply(self) -> None:
        """Change TRL's modules, or raise and change none."""
        try:
            _quietly(self._patching.apply)
        except PatchError as error:
            tested = [name for name in self.trainers if installed_version("trl") in load_patches("trl", name).tested]
            if tested and len(tested) < len(self.trainers):
                error.add_note(f"apply_to_trl(trainers={tested}) leaves out those that were not tested here")
            raise
        try:
            for name in self.trainers:
                self.pairs[name] = _quietly(import_module, f"kl_plugins.trl.{name}").PAIR
            self._check_options()
            for pair in self.pairs.values():
                self._names |= {pair.trainer: pair.our_trainer, pair.config: self._config_of(pair)}
            _rename(self._names)
        except BaseException:
            self._restore()
            raise
        names = ", ".join(sorted(pair.trainer.__name__ for pair in self.pairs.values()))
        default = f"by default {self.options}" if self.options else "by default kl=None, TRL's own KL"
        logger.warning(f"kl_plugins: the kl_* options of TRL {installed_version('trl')}'s {names} work now, {default}")

    def undo(self) -> None:
        """Give TRL's names back, if this was the last to be undone; trainers that were made meanwhile keep their KL.

        Raises `PatchError` for what somebody else has replaced since, and leaves that as it is; call it again then.
        """
        global _applied
        with _lock:
            if _applied is not self:
                return
            self.times = max(self.times - 1, 0)
            if self.times == 0:
                self._restore()
                _applied = None

    def _restore(self) -> None:
        _rename({ours: trls for trls, ours in self._names.items()})
        self._patching.undo()

    def bindings(self) -> list[Binding]:
        """What is replaced in this process, and how often it was called."""
        return [binding for binding in self._patching.bindings() if binding.role != "check"]

    def __enter__(self) -> AppliedToTRL:
        if _applied is not self:
            raise PatchError("this apply_to_trl was undone: call it again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.undo()

    def check_trainer(self, trainer: Any, args: Any) -> None:
        """Raise for a trainer, about to be made with `args`, that would train on TRL's own KL unasked."""
        name = next((name for name in TRAINERS if _is_one(trainer, name)), None)
        if name not in self.pairs:
            return
        pair = self.pairs[name]
        before = "was not imported from trl, or derived from what was, after apply_to_trl: call that above the imports"
        if not isinstance(trainer, pair.methods):
            raise PatchError(f"{type(trainer).__module__}.{type(trainer).__name__} {before}")
        if args is not None and not isinstance(args, KLConfigMixin):
            raise PatchError(f"the {type(args).__name__} that {type(trainer).__name__} was given {before}")
        refuse([NO_KL] if self.require_kl and args is not None and args.kl is None else [])

    def _config_of(self, pair: TrainerPair) -> type:
        """Our config with `options` as defaults, under TRL's name. It is saved as `pair.our_config`."""
        hints = get_type_hints(pair.our_config)
        known = {f.name: f for f in fields(pair.fields)}
        changed = [
            (name, hints[name], _with_default(known[name], value))
            for name, value in self.options.items()
            if name in known
        ]

        def reduce(config: Any, protocol: int) -> Any:
            if type(config) is not made:  # a user's own, derived from it
                return object.__reduce_ex__(config, protocol)
            return _restored, (pair.our_config, config.__dict__)

        namespace = {"__reduce_ex__": reduce, "kl_required": self.require_kl}
        made = make_dataclass(pair.config.__name__, changed, bases=(pair.our_config,), namespace=namespace)
        for name in ("__module__", "__qualname__", "__doc__"):
            setattr(made, name, getattr(pair.config, name))
        return made

    def _check_options(self) -> None:
        known = {f.name for pair in self.pairs.values() for f in fields(pair.fields)}
        problems = []
        for name in sorted(self.options.keys() - known):
            close = get_close_matches(name, known, n=1)
            problems.append(
                f"{name} is no option of {', '.join(self.trainers)}" + f"; did you mean {close[0]}?" * bool(close)
            )
        refuse(problems)
        shared = {f.name for f in fields(KLOptions)} & self.options.keys()
        KLOptions(**{name: self.options[name] for name in shared}).kl_spec()


def with_kl(init: Callable[..., None]) -> Callable[..., None]:
    """What takes the place of the `__init__` of one of TRL's trainers: it, after `AppliedToTRL.check_trainer`."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if _applied is not None:
            _applied.check_trainer(self, signature.bind(self, *args, **kwargs).arguments.get("args"))
        init(self, *args, **kwargs)

    return __init__


def _quietly(import_: Callable[..., Any], *args: Any) -> Any:
    """Without TRL's warning that something experimental is imported, which nobody here asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
        return import_(*args)


def _rename(names: dict[type, type]) -> None:
    """In all modules of TRL but those that define them, whatever stands for one of the keys stands for its value."""
    for package, cls in product(("trl", "trl.trainer"), names):
        getattr(import_module(package), cls.__name__, None)  # they look their names up on first use
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and name.partition(".")[0] == "trl":
            for attribute, found in list(vars(module).items()):
                if (
                    isinstance(found, type)
                    and found in names
                    and name not in (found.__module__, names[found].__module__)
                ):
                    setattr(module, attribute, names[found])


def _is_one(trainer: Any, name: str) -> bool:
    """Whether it is one of TRL's trainers of that name."""
    module = TRAINERS[name][0]
    return any(cls.__module__.startswith(module) for cls in type(trainer).__mro__)


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def _with_default(known: Field[Any], value: Any) -> Any:
    if isinstance(value, list):
        return field(default_factory=functools.partial(list, value), metadata=known.metadata)
    return field(default=value, metadata=known.metadata)


def _restored(cls: type, state: dict[str, Any]) -> Any:
    config: Any = object.__new__(cls)
    config.__dict__.update(state)
    return config
