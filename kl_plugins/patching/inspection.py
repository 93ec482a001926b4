"""Find a function of a host and say whether it is the one that was tested: its source, its signature, who holds it."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import logging
import os
import pkgutil
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import CodeType, FunctionType, MappingProxyType, ModuleType
from typing import Any

from kl_plugins.errors import PatchError
from kl_plugins.patching.targets import HostPatches, Target, refuse_all
from kl_plugins.patching.versions import installed_version

OWNER_MARK = "__patched_by__"
ALLOW_UNTESTED = "KL_PLUGINS_ALLOW_UNTESTED"  # the environment variable by which users say so
NONE: Mapping[Any, Any] = MappingProxyType({})

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A target against the installed host."""

    target: str
    state: str  # same, changed (its source), signature (that too) or missing (or nothing that can be patched)
    digest: str = ""
    signature: str = ""
    detail: str = ""  # why it is missing


def source_digest(function: Callable[..., Any]) -> str:
    """SHA-256 of a function's own source, with its decorator lines, without indentation and trailing whitespace."""
    own: Any = inspect.unwrap(function)
    lines = _source(own, getattr(own, "__code__", None)).splitlines()
    text = textwrap.dedent("\n".join(line.rstrip() for line in lines)).strip("\n")
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=512)
def _source(own: Callable[..., Any], code: CodeType | None) -> str:
    """Kept for as long as the function has that code: a config asks for four functions, and each takes up to 20 ms."""
    return inspect.getsource(own)


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
    examine(patches, patches.targets, allow_untested)


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


@dataclass(eq=False)
class Found:
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
        """What the host finds under the name now."""
        return vars(self.holder).get(self.attribute)

    @property
    def bound(self) -> bool:
        """Whether that is our replacement."""
        return self.current is self.installed

    def install(self, owner: str) -> None:
        """Put the replacement there, marked as `owner`'s. Raises `PatchError` if it can't be made or doesn't stay."""
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


def examine(
    patches: HostPatches,
    targets: Sequence[Target],
    allow_untested: bool,
    modules: Mapping[str, ModuleType] = NONE,
    ours: Mapping[int, Found] = NONE,
    claim: bool = False,
) -> list[Found]:
    """The targets in the installed host, or one `PatchError` with all that is wrong with them."""
    if not targets:
        return []
    version, tested = _version(patches), ", ".join(patches.tested)
    remedy, there, problems = _remedy(patches, version), [], []
    if version not in patches.tested and not allow_untested:
        problems.append(
            f"{version} was not tested, {tested} was: {remedy} or, if no function changed, allow_untested "
            f"({ALLOW_UNTESTED}=1)"
        )
    for target in targets:
        try:
            found = _find(patches, target, version, modules.get(target.module), ours)
            if target.wrapper:
                _factory(target)
        except PatchError as error:
            problems.append(str(error))
            continue
        if found.digest not in found.known:
            known = " or ".join(sorted(digest[:12] for digest in found.known))
            problems.append(f"{target.name}: its source has digest {found.digest[:12]}, tested was {known}: {remedy}")
        if found.signature not in target.signatures:
            known = " or ".join(target.signatures)
            problems.append(f"{target.name} is called {found.signature}, tested was {known}: {remedy}")
        if claim and target.wrapper and hasattr(found.function, OWNER_MARK):
            problems.append(
                f"{target.name} is already patched by {getattr(found.function, OWNER_MARK)}: undo that first"
            )
        there.append(found)
    parts = f" ({', '.join(patches.parts)})" if patches.parts else ""
    refuse_all(f"{patches.host} {version}{parts} can't be hooked", problems)
    if version not in patches.tested:
        names = ", ".join(target.name for target in targets)
        logger.warning(
            "%s %s was not tested, %s was; unchanged, and opted in: %s", patches.host, version, tested, names
        )
    return there


def _find(
    patches: HostPatches, target: Target, version: str, module: Any = None, ours: Mapping[int, Found] = NONE
) -> Found:
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
    installed = ours.get(id(before))  # what we installed elsewhere, imported from there by name
    original = installed.original if installed and installed.holder is not holder else before
    function = original.__func__ if isinstance(original, staticmethod | classmethod) else original
    if not isinstance(function, FunctionType):
        raise PatchError(f"{name} is a {type(function).__name__}, not a function or method: {remedy}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise PatchError(f"{name} is a generator, which can't be patched: choose what it calls")
    own = inspect.unwrap(function)
    try:
        decorated = _source(own, getattr(own, "__code__", None)).lstrip().startswith("@")
    except (OSError, TypeError) as error:
        raise PatchError(f"{name}: its source can't be read ({error}): {remedy}") from error
    if "<locals>" in own.__qualname__:
        raise PatchError(f"{name} is {_who(own)}, which hides the source that counts: choose what it calls")
    if own is not function and not decorated and not hasattr(function, OWNER_MARK):
        raise PatchError(f"{name} is already wrapped, by {_who(function)}: undo that first")
    digest, signature = source_digest(own), bare_signature(function)
    return Found(target, version, holder, part, before, original, function, digest, signature)


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
