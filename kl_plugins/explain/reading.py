"""A training configuration as its user wrote it, in a YAML or JSON file or as flags, read without its host."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kl_plugins.errors import ConfigError, refuse
from kl_plugins.integration.leave_out import words_of

_LOOKS_LIKE_KL = re.compile(r"(^|[_.-])kl([_.-]|$)")
_TRUE, _FALSE, _NONE = ("true", "yes", "1", "t", "y"), ("false", "no", "0", "f", "n"), ("none", "null")


def read_file(path: str | Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file. `ConfigError` if it can't be read, isn't either, or holds something else."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else _yaml(text, path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}; name a YAML or JSON file") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}; mend it, or give the options as flags after --") from error
    if not isinstance(found, dict):
        what = "nothing" if found is None else f"a {type(found).__name__}"
        raise ConfigError(f"{path} holds {what}: a mapping of options was expected, such as `kl: k2_as_loss`")
    return {str(key): value for key, value in found.items()}


def _yaml(text: str, path: Path) -> Any:
    try:
        import yaml  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ConfigError(f"{path} is YAML, which needs PyYAML: pip install pyyaml, or use JSON or flags") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML: {where}; mend it, or give the options as flags after --") from error


def read_flags(words: Iterable[str]) -> dict[str, list[str]]:
    """`--name value ...` and `--name=value` as name -> values. A `--` between them is skipped, the last one wins."""
    flags: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if name:
                values = flags[name] = [value] if equals else []
        elif values is None:
            raise ConfigError(f"{word!r} stands before any flag: give --name value after --, or one file before it")
        else:
            values.append(word)
    return flags


def from_flags(flags: Mapping[str, Sequence[str]], *, trl: bool) -> dict[str, Any]:
    """What `flags` say, by the names of the options: as TRL's own parser takes them, or as OpenRLHF's and ours do.

    TRL's takes dashes for underscores and `--no_name` for false; OpenRLHF's flags have dots in their names, ours
    dashes, and a switch takes no value.
    """
    found: dict[str, Any] = {}
    for flag, values in flags.items():
        name = flag if "." in flag else flag.replace("-", "_")
        switched_off = not values and name.startswith("no_")
        if switched_off:
            name = name.removeprefix("no_")
        if not values:
            found[name] = not switched_off
        else:
            found[name] = values[0] if len(values) == 1 else list(values)
        if not trl and len(values) == 1 and values[0].lower() in ("true", "false"):
            raise ConfigError(
                f"--{flag} {values[0]}: a switch of OpenRLHF takes no value; give --{flag}, or leave it out"
            )
    return found


def convert(
    given: Mapping[str, Any], options: Mapping[str, tuple[type, Any]], choices: Mapping[str, Collection[str]]
) -> dict[str, Any]:
    """The options of `given` that are in `options` (name -> type and default), as values of those types.

    Raises `ConfigError` for all that can't be one at once.
    """
    found, problems = {}, []
    for name in sorted(given.keys() & options.keys()):
        kind, default = options[name]
        try:
            found[name] = _as(kind, given[name])
            if found[name] is None and default is not None:
                raise ValueError(given[name])
        except (TypeError, ValueError):
            problems.append(f"{name}={given[name]!r}: {_EXPECTED[kind]} was expected")
            continue
        if name in choices and found[name] not in choices[name]:
            problems.append(f"{name}={given[name]!r} is not offered: choose from {', '.join(choices[name])}")
    refuse(problems)
    return found


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", list: "two numbers"}
_EXPECTED |= {dict: "a mapping", tuple: "a list of words"}


def _as(kind: type, value: Any) -> Any:
    word = value.strip().lower() if isinstance(value, str) else None
    if value is None or (word in _NONE and kind is not str):
        return None
    if kind is bool and (isinstance(value, bool) or word in (*_TRUE, *_FALSE)):
        return value if word is None else word in _TRUE
    if kind is dict:
        return dict(json.loads(value) if isinstance(value, str) else value)
    if kind is tuple and not isinstance(value, dict):
        return words_of(value)
    if kind is list and not isinstance(value, str):
        low, high = value
        return [float(low), float(high)]
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float) and not isinstance(value, bool) and kind(float(value)) == float(value):  # NaN isn't
        return kind(float(value))
    raise ValueError(value)


def refuse_unknown_kl(given: Collection[str], known: Collection[str], of: str) -> None:
    """`ConfigError` for options that speak of a KL but that nobody reads, with the closest name that is read."""
    problems = []
    for name in sorted(set(given) - set(known)):
        if _LOOKS_LIKE_KL.search(name):
            close = get_close_matches(name, known, n=1) or get_close_matches(name.rpartition(".")[2], known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            about = ", ".join(sorted(other for other in known if _LOOKS_LIKE_KL.search(other)))
            problems.append(f"unknown option {name!r} of {of}: {hint}those about the KL are {about}")
    refuse(problems)


__all__ = ["convert", "from_flags", "read_file", "read_flags", "refuse_unknown_kl"]
