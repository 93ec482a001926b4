"""What may be replaced inside a host, as data: `patches/<host>.toml`, read and checked.

Which functions of which host versions, by what and why. No line of a host's source is in it: a function is known by
the digest of its source and by its signature.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kl_plugins.errors import PatchError

_NAME = r"[\w.]+:[\w.]+"
_TEXTS = {
    "name": _NAME,
    "role": "loss|reward|sampling|log|start|check",
    "wrapper": _NAME,
    "reason": ".+",
}
_SIGNATURE = r"\(.*\)"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One function of a host, what replaces it, and how it looked in each tested version."""

    name: str  # module:qualified.name, where it is looked up; it may be defined elsewhere
    role: str  # loss, reward, sampling, log, start (of processes); check: it is relied on, and left as it is
    signatures: tuple[str, ...]  # `bare_signature` of the function, in one tested version or another
    reason: str  # one sentence: why it must be replaced
    digests: Mapping[str, str]  # tested version -> `source_digest` of the function
    part: str = ""  # of the host; what is hooked or relied on together
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
    """What `patches/<host>.toml` says of a host, or of some of its parts."""

    host: str  # the name of the distribution
    tested: tuple[str, ...]  # the versions whose digests are known, oldest first
    targets: tuple[Target, ...]  # in the order in which they are applied
    parts: tuple[str, ...] = ()  # those that were asked for; none means all


def load_patches(host: str, *parts: str, folder: Path | None = None) -> HostPatches:
    """Read `<host>.toml` of the folder, by default the one that comes with `kl_plugins`.

    With `parts`, only their targets, and the versions in which all of those were tested.

    Raises one `PatchError` that lists all that is wrong with the file.
    """
    package = Path(__file__).parents[1]  # in a wheel the data lies within the package, in a clone beside it
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
    targets = [_target(**entry) for entry in data["target"]]
    offered = dict.fromkeys(target.part for target in targets)
    if unknown := set(parts) - set(offered):
        raise PatchError(f"{path} has no part {', '.join(sorted(unknown))}: it has {', '.join(offered)}")
    chosen = tuple(target for target in targets if not parts or target.part in parts)
    versions = [version for version in data["tested"] if not parts or all(version in t.digests for t in chosen)]
    return HostPatches(host=host, tested=tuple(versions), targets=chosen, parts=parts)


def _target(*, digests: dict[str, str], signature: str | list[str], links: Sequence[str] = (), **texts: str) -> Target:
    signatures = (signature,) if isinstance(signature, str) else tuple(signature)
    return Target(**texts, digests=MappingProxyType(digests), signatures=signatures, links=tuple(links))


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
        signatures = entry.get("signature", "()")
        unused = {"wrapper"} if entry.get("role") == "check" else set()
        yield from _wrong_keys(where, entry, {*_TEXTS, "digests", "signature"} - unused, {"links", "part"})
        if names.count(entry.get("name")) > 1:
            yield f"{where} is listed more than once"
        for key, pattern in _TEXTS.items():
            if key in entry and not _matches(pattern, entry[key]):
                yield f"{where}: {key} must match {pattern}, not be {entry[key]!r}"
        signatures = [signatures] if isinstance(signatures, str) else signatures
        if not _list_of(str, signatures) or not all(_matches(_SIGNATURE, each) for each in signatures):
            yield f"{where}: signature must match {_SIGNATURE}, or be a list of such, not {entry['signature']!r}"
        if not _matches(r"\w*", entry.get("part", "")):
            yield f"{where}: part must be a word, not {entry['part']!r}"
        if "links" in entry and not _list_of(str, entry["links"]):
            yield f"{where}: links must be a list of addresses"
        if not isinstance(digests, dict) or not all(_matches("[0-9a-f]{64}", digest) for digest in digests.values()):
            yield f"{where}: digests must be a table, version = SHA-256 in hex"
        else:
            needed = _versions(entry, entries) & set(tested) or set(tested)
            yield from _wrong_keys(f"{where}: digests", digests, needed)


def _versions(entry: dict[str, Any], entries: list[dict[str, Any]]) -> set[str]:
    """All versions that the targets of one part have digests for; of a file without parts, none."""
    together = [each.get("digests") for each in entries if "part" in entry and each.get("part") == entry["part"]]
    return {version for digests in together if isinstance(digests, dict) for version in digests}


def _wrong_keys(
    where: str, found: dict[str, Any], needed: Set[str], optional: Set[str] = frozenset()
) -> Iterator[str]:
    yield from (f"{where} lacks {key!r}" for key in sorted(needed - found.keys()))
    yield from (f"{where} has an unknown {key!r}" for key in sorted(found.keys() - needed - optional))


def _list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, kind) for each in value)


def _matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None
