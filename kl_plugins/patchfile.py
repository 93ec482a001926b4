"""What may be replaced inside a host, as data: `patches/<host>.toml`, read and checked.

Which functions of which host versions, by what and why. No line of a host's source is in it: a function is known by
the digest of its source and by its signature.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kl_plugins.errors import PatchError

_NAME = r"[\w.]+:[\w.]+"
_TEXTS = {
    "name": _NAME,
    "role": "loss|reward|sampling|log|check",
    "wrapper": _NAME,
    "signature": r"\(.*\)",
    "reason": ".+",
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """One function of a host, what replaces it, and how it looked in each tested version."""

    name: str  # module:qualified.name, where it is looked up; it may be defined elsewhere
    role: str  # loss, reward, sampling or log; check: it is relied on, so it must be as tested, and is left as it is
    signature: str  # `bare_signature` of the function
    reason: str  # one sentence: why it must be replaced
    digests: Mapping[str, str]  # tested version -> `source_digest` of the function
    wrapper: str = ""  # module:name of what is called with the original and returns what takes its place
    links: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The module in which the name is looked up."""
        return self.name.partition(":")[0]

    @property
    def qualname(self) -> str:
        """The dotted name within the module."""
        return self.name.partition(":")[2]


@dataclass(frozen=True, kw_only=True)
class HostPatches:
    """What `patches/<host>.toml` says."""

    host: str  # the name of the distribution
    tested: tuple[str, ...]  # the versions whose digests are known, oldest first
    targets: tuple[Target, ...]  # in the order in which they are applied


def load_patches(host: str, folder: Path | None = None) -> HostPatches:
    """Read `<host>.toml` of the folder, by default the one that comes with `kl_plugins`.

    Raises one `PatchError` that lists all that is wrong with the file.
    """
    package = Path(__file__).parent  # in a wheel the data lies within the package, in a clone beside it
    folder = folder or (package / "_patches" if (package / "_patches").exists() else package.parent / "patches")
    path = folder / f"{host}.toml"
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in folder.glob("*.toml"))) or "none"
        raise PatchError(f"patches for {host!r} were asked for, which {folder} lacks: known are {known}") from None
    except ValueError as error:  # of TOML or of UTF-8
        raise PatchError(f"{path} is not TOML: {error}") from error
    refuse_all(f"{path} can't be used", list(_wrong(host, data)))
    targets = (
        Target(**entry | {"digests": MappingProxyType(entry["digests"]), "links": tuple(entry.get("links", ()))})
        for entry in data["target"]
    )
    return HostPatches(host=host, tested=tuple(data["tested"]), targets=tuple(targets))


def refuse_all(what: str, problems: list[str]) -> None:
    """Raise one `PatchError` that lists every problem; return if there is none."""
    if problems:
        raise PatchError("\n- ".join([f"{what}:", *problems]))


def _wrong(host: str, data: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the contents of a file."""
    yield from _wrong_keys("the file", data, {"host", "tested", "target"})
    tested: Any = data.get("tested")
    entries: Any = data.get("target")
    if data.get("host") != host or not _list_of(str, tested) or not _list_of(dict, entries):
        yield f"it needs host = {host!r}, tested = [versions, oldest first] and at least one [[target]]"
        return
    names = [entry.get("name") for entry in entries]
    for entry in entries:
        where, digests = f"target {entry.get('name')!r}", entry.get("digests", {})
        unused = {"wrapper"} if entry.get("role") == "check" else set()
        yield from _wrong_keys(where, entry, {*_TEXTS, "digests"} - unused, {"links"})
        if names.count(entry.get("name")) > 1:
            yield f"{where} is listed more than once"
        for key, pattern in _TEXTS.items():
            if key in entry and not _matches(pattern, entry[key]):
                yield f"{where}: {key} must match {pattern}, not be {entry[key]!r}"
        if "links" in entry and not _list_of(str, entry["links"]):
            yield f"{where}: links must be a list of addresses"
        if not isinstance(digests, dict) or not all(_matches("[0-9a-f]{64}", digest) for digest in digests.values()):
            yield f"{where}: digests must be a table, version = SHA-256 in hex"
        else:
            yield from _wrong_keys(f"{where}: digests", digests, set(tested))


def _wrong_keys(
    where: str, found: dict[str, Any], needed: Set[str], optional: Set[str] = frozenset()
) -> Iterator[str]:
    yield from (f"{where} lacks {key!r}" for key in sorted(needed - found.keys()))
    yield from (f"{where} has an unknown {key!r}" for key in sorted(found.keys() - needed - optional))


def _list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, kind) for each in value)


def _matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None
