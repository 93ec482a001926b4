"""Patches for hosts that offer no seam: find, check, claim, apply, verify, and undo in reverse.

Which functions of which host versions may be replaced, and by what, is data: `patches/<host>.toml`. A function is
replaced only where its source and its signature are those that were tested; anything unknown is refused, and nothing
stays patched after a failure half-way. A wrapper is called with the original function and returns what takes its
place. Its module must not import the modules that it patches at its own top level: they may just be being imported.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import logging
import os
import pkgutil
import re
import sys
import textwrap
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, MappingProxyType, ModuleType, TracebackType
from typing import Any
from weakref import WeakSet

from kl_plugins.errors import PatchError
from kl_plugins.hosts import installed_version
from kl_plugins.patchfile import HostPatches, Target, refuse_all

OWNER_MARK = "__patched_by__"
ALLOW_UNTESTED = "KL_PLUGINS_ALLOW_UNTESTED"  # the environment variable by which users say so
_NONE: Mapping[Any, Any] = MappingProxyType({})
_PATCHINGS: WeakSet[Patching] = WeakSet()

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A target against the installed host."""

    target: str
    state: str  # same, changed (its source), signature (that too) or missing (or nothing that can be patched)
    digest: str = ""
    signature: str = ""
    detail: str = ""  # why it is missing


@dataclass(frozen=True, kw_only=True)
class Binding:
    """A target as it is in this process: a plain record, fit for `dataclasses.asdict` and JSON."""

    target: str
    role: str
    host: str
    version: str  # that it was applied to; empty if it never was, as is the digest
    digest: str
    calls: int  # of the replacement; kept when it is undone
    bound: bool  # whether the host finds the replacement now
    pid: int


def source_digest(function: Callable[..., Any]) -> str:
    """SHA-256 of a function's own source, with its decorator lines, without indentation and trailing whitespace."""
    lines = inspect.getsource(inspect.unwrap(function)).splitlines()
    text = textwrap.dedent("\n".join(line.rstrip() for line in lines)).strip("\n")
    return hashlib.sha256(text.encode()).hexdigest()


def bare_signature(function: Callable[..., Any]) -> str:
    """The signature without annotations, and without the addresses in the defaults' reprs."""
    own = inspect.unwrap(function)
    if isinstance(own, FunctionType):  # not its __signature__, which others (Ray, of its actors' methods) rewrite
        bare = FunctionType(own.__code__, {}, argdefs=own.__defaults__, closure=own.__closure__)
        bare.__kwdefaults__ = own.__kwdefaults__
        own = bare
    found = inspect.signature(own)
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in found.parameters.values()]
    text = str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def check(patches: HostPatches, *, allow_untested: bool = False) -> None:
    """Raise one `PatchError` that lists all that stands against patching the installed host; nothing is patched.

    Imports the host's modules. `allow_untested` accepts an unknown version, with a logged warning, as long as
    every target has a source and a signature that were tested.
    """
    _examine(patches, patches.targets, allow_untested)


def untested_allowed() -> bool:
    """Whether the user opted in, by `KL_PLUGINS_ALLOW_UNTESTED`, to versions in which every target is unchanged."""
    return os.environ.get(ALLOW_UNTESTED, "") not in ("", "0")


def changes(patches: HostPatches) -> list[Change]:
    """Every target against the installed host: what adding its version takes.

    Of a version that was tested, without the targets that it doesn't have. Raises `PatchError` only if the host isn't
    installed.
    """
    version, report = _version(patches), []
    there = [each for each in patches.targets if version in each.digests] or patches.targets
    for target in there:
        try:
            found = _find(patches, target, version)
        except PatchError as error:
            report.append(Change(target=target.name, state="missing", detail=str(error)))
            continue
        same = "same" if found.digest in found.known else "changed"
        state = same if found.signature in target.signatures else "signature"
        report.append(Change(target=target.name, state=state, digest=found.digest, signature=found.signature))
    return report


def active() -> list[Binding]:
    """What is replaced in this process now, by whichever `Patching`."""
    return [binding for patching in _PATCHINGS for binding in patching.bindings() if binding.bound]


class Patching:
    """The targets of one host, applied in this process and undone again; as a context manager, for a while.

    `owner` is whom a second patch of the same target is told about.
    """

    def __init__(self, patches: HostPatches, owner: str = "kl_plugins", *, allow_untested: bool = False) -> None:
        self.patches, self.owner, self.allow_untested = patches, owner, allow_untested
        self._applied: list[_Seam] = []  # what is to be undone
        self._latest: dict[str, _Seam] = {}  # by target
        self._finder: _Finder | None = None
        _PATCHINGS.add(self)

    def apply(self) -> None:
        """Import the host's modules and replace every target, or raise one `PatchError` and replace none."""
        self._refuse_twice()
        self._apply(self.patches.targets, _NONE)

    def apply_on_import(self) -> None:
        """Replace the targets of modules already imported now, and those of others as soon as they are executed.

        A module whose targets don't pass the check can't be imported: that raises the `PatchError`. Who imports a
        replaced function by name gets the replacement, unless that name is a target of its own.
        """
        self._refuse_twice()
        self._finder = _Finder(self._executed, {target.module for target in self.patches.targets})
        sys.meta_path.insert(0, self._finder)
        imported = {name: module for name in self._finder.modules if (module := sys.modules.get(name))}
        try:
            self._apply([target for target in self.patches.targets if target.module in imported], imported)
        except BaseException as error:
            self._remove_finder()
            self._roll_back(self._applied, error)
            raise

    def undo(self) -> None:
        """Put the host's own objects back, last first, and stop watching imports.

        Raises `PatchError` for targets that somebody else has replaced since: they are left as they are, and another
        `undo` tries again. All others are undone.
        """
        self._remove_finder()
        refuse_all(f"{self.patches.host} can't be restored", self._undo(self._applied))

    def bindings(self) -> list[Binding]:
        """Every target as it is in this process, applied or not."""
        return [
            Binding(
                target=target.name,
                role=target.role,
                host=self.patches.host,
                version=seam.version if seam else "",
                digest=seam.digest if seam else "",
                calls=seam.calls if seam else 0,
                bound=seam is not None and seam.bound,
                pid=os.getpid(),
            )
            for target in self.patches.targets
            for seam in [self._latest.get(target.name)]
        ]

    def __enter__(self) -> Patching:
        self.apply()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.undo()

    def _refuse_twice(self) -> None:
        if self._applied or self._finder:
            raise PatchError(f"{self.patches.host} is patched by {self.owner}, by this very Patching: undo() it first")

    def _apply(self, targets: Sequence[Target], modules: Mapping[str, ModuleType]) -> None:
        ours = {id(seam.installed): seam for seam in self._applied}
        made: list[_Seam] = []
        try:
            for seam in _examine(self.patches, targets, self.allow_untested, modules, ours, claim=True):
                if seam.target.wrapper:
                    made.append(seam)
                    self._applied.append(seam)
                    seam.install(self.owner)
                self._latest[seam.target.name] = seam
        except BaseException as error:
            self._roll_back(made, error)
            raise

    def _executed(self, module: ModuleType) -> None:
        if self._finder is None:  # undone since the module was found
            return
        name = module.__name__
        # A module that is reloaded has overwritten its functions; its former classes still have their replacements.
        self._applied = [seam for seam in self._applied if seam.bound or seam.target.module != name]
        self._apply([target for target in self.patches.targets if target.module == name], {name: module})

    def _undo(self, seams: Sequence[_Seam]) -> list[str]:
        problems = {seam: seam.uninstall() for seam in reversed(seams)}
        self._applied = [seam for seam in self._applied if problems.get(seam) != ""]
        return [problem for problem in problems.values() if problem]

    def _roll_back(self, seams: Sequence[_Seam], error: BaseException) -> None:
        for problem in self._undo(seams):
            error.add_note(f"Not undone: {problem}")

    def _remove_finder(self) -> None:
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        self._finder = None


@dataclass(eq=False)
class _Seam:
    """A target in the installed host, and what was done to it."""

    target: Target
    version: str
    holder: Any  # the module or class whose attribute it is
    attribute: str
    before: Any  # what the attribute was when it was found
    original: Any  # what undoing leaves: as before, unless that is our own replacement, imported by name
    function: Any  # the original without the staticmethod or classmethod around it
    digest: str
    signature: str
    installed: Any = field(default_factory=object)
    calls: int = 0  # without a lock: the function that counts may be pickled

    @property
    def known(self) -> set[str]:
        """The digests that will do: the version's own or, for an untested one, any."""
        digests = self.target.digests
        return {digests[self.version]} if self.version in digests else set(digests.values())

    @property
    def current(self) -> Any:
        return vars(self.holder).get(self.attribute)

    @property
    def bound(self) -> bool:
        return self.current is self.installed

    def install(self, owner: str) -> None:
        name, wrapper, original = self.target.name, self.target.wrapper, self.original
        if self.current is not self.before:
            raise PatchError(f"{name} was replaced meanwhile, by {_who(self.current)}: list it only once")
        try:
            replacement = _factory(self.target)(self.function)
        except Exception as error:
            raise PatchError(f"{name}: {wrapper} raised {type(error).__name__} ({error}): fix it") from error
        if not callable(replacement):
            raise PatchError(f"{name}: {wrapper} returned {replacement!r}: it must return a function")
        counted = self._counted(replacement)
        setattr(counted, OWNER_MARK, owner)
        self.installed = type(original)(counted) if isinstance(original, staticmethod | classmethod) else counted
        setattr(self.holder, self.attribute, self.installed)
        if not self.bound:
            raise PatchError(f"{name} can't be replaced: it is {_who(self.current)} even after it was set")

    def uninstall(self) -> str:
        """Put the original back; if something else is there, leave it and say whose it is."""
        if self.bound:
            setattr(self.holder, self.attribute, self.original)
        elif self.current is not self.original and self.current is not self.before:
            return f"{self.target.name} is now {_who(self.current)}: undo that first, then this"
        return ""

    def _counted(self, replacement: Callable[..., Any]) -> Callable[..., Any]:
        """The replacement, counted, and in the eyes of the host its own function."""

        @functools.wraps(self.function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return replacement(*args, **kwargs)

        @functools.wraps(self.function)
        async def counted_async(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return await replacement(*args, **kwargs)

        return counted_async if inspect.iscoroutinefunction(self.function) else counted


class _Finder(MetaPathFinder):
    """Lets the finders behind it find the modules, and sees to it that `executed` is called with each."""

    def __init__(self, executed: Callable[[ModuleType], None], modules: set[str]) -> None:
        self.executed, self.modules = executed, modules
        self._asking: set[tuple[int, str]] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        asking = (threading.get_ident(), fullname)
        if fullname not in self.modules or asking in self._asking or self not in sys.meta_path:
            return None
        self._asking.add(asking)  # one of the others may ask all finders itself, this one too
        try:
            others = sys.meta_path[sys.meta_path.index(self) + 1 :]
            found = (finder.find_spec(fullname, path, target) for finder in others)
            spec = next((each for each in found if each), None)
        finally:
            self._asking.discard(asking)
        if spec:
            if not hasattr(spec.loader, "exec_module"):
                raise PatchError(f"{fullname} can't be patched while {spec.loader!r} loads it: import it before")
            spec.loader = _Loader(spec.loader, self.executed)
        return spec


class _Loader(Loader):
    """Another loader, which the module gets to see, with `executed` called after it has executed the module."""

    def __init__(self, loader: Any, executed: Callable[[ModuleType], None]) -> None:
        self._loader, self._executed = loader, executed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ and module.__spec__.loader is self:
            module.__spec__.loader = self._loader
        if module.__loader__ is self:
            module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._executed(module)


def _examine(
    patches: HostPatches,
    targets: Sequence[Target],
    allow_untested: bool,
    modules: Mapping[str, ModuleType] = _NONE,
    ours: Mapping[int, _Seam] = _NONE,
    claim: bool = False,
) -> list[_Seam]:
    """The targets in the installed host, or one `PatchError` with all that is wrong with them."""
    if not targets:
        return []
    version, tested = _version(patches), ", ".join(patches.tested)
    remedy, seams, problems = _remedy(patches, version), [], []
    if version not in patches.tested and not allow_untested:
        problems.append(
            f"{version} was not tested, {tested} was: {remedy} or, if no function changed, allow_untested "
            f"({ALLOW_UNTESTED}=1)"
        )
    for target in targets:
        try:
            seam = _find(patches, target, version, modules.get(target.module), ours)
            if target.wrapper:
                _factory(target)
        except PatchError as error:
            problems.append(str(error))
            continue
        if seam.digest not in seam.known:
            known = " or ".join(sorted(digest[:12] for digest in seam.known))
            problems.append(f"{target.name}: its source has digest {seam.digest[:12]}, tested was {known}: {remedy}")
        if seam.signature not in target.signatures:
            known = " or ".join(target.signatures)
            problems.append(f"{target.name} is called {seam.signature}, tested was {known}: {remedy}")
        if claim and target.wrapper and hasattr(seam.function, OWNER_MARK):
            problems.append(
                f"{target.name} is already patched by {getattr(seam.function, OWNER_MARK)}: undo that first"
            )
        seams.append(seam)
    parts = f" ({', '.join(patches.parts)})" if patches.parts else ""
    refuse_all(f"{patches.host} {version}{parts} can't be hooked", problems)
    if version not in patches.tested:
        names = ", ".join(target.name for target in targets)
        logger.warning(
            "%s %s was not tested, %s was; unchanged, and opted in: %s", patches.host, version, tested, names
        )
    return seams


def _find(
    patches: HostPatches, target: Target, version: str, module: Any = None, ours: Mapping[int, _Seam] = _NONE
) -> _Seam:
    """The target, if need be by importing its module; `PatchError` if there is no function that can be patched."""
    name, remedy = target.name, _remedy(patches, version)
    try:
        before: Any = module or importlib.import_module(target.module)
    except Exception as error:
        raise PatchError(
            f"{name}: its import raised {type(error).__name__} ({error}): make that import work"
        ) from error
    for part in target.qualname.split("."):
        holder = before
        if not isinstance(holder, type | ModuleType):
            raise PatchError(f"{name} is missing: {holder!r}, where {part!r} should be, is no class: {remedy}")
        if part not in vars(holder):
            raise PatchError(f"{name} is missing: {_instead(holder, part)}: {remedy}")
        before = vars(holder)[part]
    seam = ours.get(id(before))  # what we installed elsewhere, imported from there by name
    original = seam.original if seam and seam.holder is not holder else before
    function = original.__func__ if isinstance(original, staticmethod | classmethod) else original
    if not isinstance(function, FunctionType):
        raise PatchError(f"{name} is a {type(function).__name__}, not a function or method: {remedy}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise PatchError(f"{name} is a generator, which can't be patched: choose what it calls")
    own = inspect.unwrap(function)
    try:
        decorated = inspect.getsource(own).lstrip().startswith("@")
    except (OSError, TypeError) as error:
        raise PatchError(f"{name}: its source can't be read ({error}): {remedy}") from error
    if "<locals>" in own.__qualname__:
        raise PatchError(f"{name} is {_who(own)}, which hides the source that counts: choose what it calls")
    if own is not function and not decorated and not hasattr(function, OWNER_MARK):
        raise PatchError(f"{name} is already wrapped, by {_who(function)}: undo that first")
    digest, signature = source_digest(own), bare_signature(function)
    return _Seam(target, version, holder, part, before, original, function, digest, signature)


def _factory(target: Target) -> Callable[..., Any]:
    try:
        factory: object = pkgutil.resolve_name(target.wrapper)
    except Exception as error:
        raise PatchError(
            f"{target.name}: its wrapper {target.wrapper} can't be found ({error}): name another"
        ) from error
    if not callable(factory):
        raise PatchError(f"{target.name}: its wrapper {target.wrapper} is {factory!r}, not a function: name another")
    return factory


def _instead(holder: Any, name: str) -> str:
    """What there is instead of an attribute that isn't there."""
    if isinstance(holder, type):
        for base in holder.__mro__:
            if name in vars(base):
                return f"{holder.__name__} inherits it from {base.__module__}:{base.__qualname__}, name that"
    close = get_close_matches(name, vars(holder), n=1)
    return f"{holder.__name__} has no {name!r}" + (f", only {close[0]!r}" if close else "")


def _who(found: Any) -> str:
    """Whose object that is: its code tells, for its name may be copied from what it wraps."""
    code = getattr(getattr(found, "__func__", found), "__code__", None)
    return f"{code.co_qualname} of {code.co_filename}:{code.co_firstlineno}" if code else repr(found)


def _version(patches: HostPatches) -> str:
    version = installed_version(patches.host)
    if version is None:
        raise PatchError(f"{patches.host} is not installed: install {patches.host}=={patches.tested[-1]}")
    return version


def _remedy(patches: HostPatches, version: str) -> str:
    if version in patches.tested:
        return f"reinstall {patches.host}=={version}, of which this is an edited copy"
    return f"install a tested version ({patches.host}=={patches.tested[-1]})"
