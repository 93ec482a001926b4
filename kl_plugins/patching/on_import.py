"""Notice when a module is imported, and see to it that something is done with it before anybody else has it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from kl_plugins.errors import PatchError


class Finder(MetaPathFinder):
    """Lets the finders behind it find the modules, and sees to it that `executed` is called with each."""

    def __init__(self, executed: Callable[[ModuleType], None], modules: set[str]) -> None:
        self.executed, self.modules = executed, modules
        self._asking: set[tuple[int, str]] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that a finder behind this one gives, with a loader that reports the executed module."""
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
