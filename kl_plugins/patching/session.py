"""The undo ledger: which targets of a host were replaced in this process, and how they are put back, last first."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from weakref import WeakSet

from kl_plugins.errors import PatchError
from kl_plugins.patching.inspection import NONE, Found, examine
from kl_plugins.patching.on_import import Finder
from kl_plugins.patching.targets import HostPatches, Target, refuse_all

_PATCHINGS: WeakSet[Patching] = WeakSet()


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


def active() -> list[Binding]:
    """What is replaced in this process now, by whichever `Patching`."""
    return [binding for patching in _PATCHINGS for binding in patching.bindings() if binding.bound]


class Patching:
    """The targets of one host, applied in this process and undone again; as a context manager, for a while.

    `owner` is whom a second patch of the same target is told about.
    """

    def __init__(self, patches: HostPatches, owner: str = "kl_plugins", *, allow_untested: bool = False) -> None:
        self.patches, self.owner, self.allow_untested = patches, owner, allow_untested
        self._applied: list[Found] = []  # what is to be undone
        self._latest: dict[str, Found] = {}  # by target
        self._finder: Finder | None = None
        _PATCHINGS.add(self)

    def apply(self) -> None:
        """Import the host's modules and replace every target, or raise one `PatchError` and replace none."""
        self._refuse_twice()
        self._apply(self.patches.targets, NONE)

    def apply_on_import(self) -> None:
        """Replace the targets of modules already imported now, and those of others as soon as they are executed.

        A module whose targets don't pass the check can't be imported: that raises the `PatchError`. Who imports a
        replaced function by name gets the replacement, unless that name is a target of its own.
        """
        self._refuse_twice()
        self._finder = Finder(self._executed, {target.module for target in self.patches.targets})
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
                version=found.version if found else "",
                digest=found.digest if found else "",
                calls=found.calls if found else 0,
                bound=found is not None and found.bound,
                pid=os.getpid(),
            )
            for target in self.patches.targets
            for found in [self._latest.get(target.name)]
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
        ours = {id(found.installed): found for found in self._applied}
        made: list[Found] = []
        try:
            for found in examine(self.patches, targets, self.allow_untested, modules, ours, claim=True):
                if found.target.wrapper:
                    made.append(found)
                    self._applied.append(found)
                    found.install(self.owner)
                self._latest[found.target.name] = found
        except BaseException as error:
            self._roll_back(made, error)
            raise

    def _executed(self, module: ModuleType) -> None:
        if self._finder is None:  # undone since the module was found
            return
        name = module.__name__
        # A module that is reloaded has overwritten its functions; its former classes still have their replacements.
        self._applied = [found for found in self._applied if found.bound or found.target.module != name]
        self._apply([target for target in self.patches.targets if target.module == name], {name: module})

    def _undo(self, those: Sequence[Found]) -> list[str]:
        problems = {found: found.uninstall() for found in reversed(those)}
        self._applied = [found for found in self._applied if problems.get(found) != ""]
        return [problem for problem in problems.values() if problem]

    def _roll_back(self, those: Sequence[Found], error: BaseException) -> None:
        for problem in self._undo(those):
            error.add_note(f"Not undone: {problem}")

    def _remove_finder(self) -> None:
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        self._finder = None
