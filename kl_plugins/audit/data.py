"""Prompts and saved rollouts, from JSON lines."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kl_plugins.errors import ConfigError

ROLLOUT_KEYS = (
    "prompt_ids (or the prompt column), completion_ids, and optionally behavior_logp, one natural log-prob a token"
)

TAKEN = ("prompt_ids", "completion_ids", "behavior_logp", "completion")
"""Columns that a reward function doesn't get as columns of the row; TRL gives it prompts and completions itself."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, for which completions are drawn."""

    prompt: Any
    """A text, or a chat's list of messages."""
    columns: dict[str, Any] = field(default_factory=dict)
    """What else its line holds, for a reward function."""

    def drawn(self, completions: list[list[int]]) -> Rollouts:
        """Its completions, drawn from the policy itself."""
        return Rollouts(prompt=self.prompt, completions=completions, columns=[self.columns] * len(completions))


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The completions of one prompt."""

    prompt: Any
    """The prompt as token ids, as a text, or as a chat's list of messages."""
    completions: list[list[int]]
    """Token ids of each completion, the end token included where one was sampled."""
    behavior_logp: list[list[float]] | None = None
    """Log-probs (nats) of each completion's tokens under the policy that sampled them; None: on-policy."""
    by_engine: bool = False
    """Whether `behavior_logp` is of the current policy in another engine, whose log-probs a host's KL doesn't see."""
    rewards: list[float] | None = None
    """Of each completion."""
    columns: list[dict[str, Any]] = field(default_factory=list)
    """What else the line of each completion (or of its prompt) holds, for a reward function."""

    def first(self, count: int) -> Rollouts:
        """The first `count` completions, with what belongs to them."""
        parts = ("completions", "behavior_logp", "rewards", "columns")
        return replace(self, **{part: found[:count] for part in parts if (found := getattr(self, part)) is not None})


def read_prompts(path: Path, column: str, *, limit: int, seed: int) -> list[Prompt]:
    """Texts or chats; a random `limit` of them if there are more.

    Raises `ConfigError` for a file that isn't there, a line that isn't a JSON object or has no (or an empty) prompt.
    """
    prompts = [
        Prompt(prompt=_prompt(path, number, row, column), columns=_others(row, column)) for number, row in _rows(path)
    ]
    if not prompts:
        raise ConfigError(f"{path} was given for prompts, but it has no line: write one JSON object a line")
    return random.Random(seed).sample(prompts, limit) if len(prompts) > limit else prompts


def read_rollouts(path: Path, column: str, *, limit: int, seed: int, reward_column: str = "") -> list[Rollouts]:
    """Saved completions, those of equal prompts together; a random `limit` of the prompts if there are more.

    `reward_column` holds their rewards; empty: they have none.

    Raises `ConfigError` for what `read_prompts` does, for completions that aren't token ids, log-probs that are no
    finite numbers or not one a token, and if some lines have log-probs and others not; for rewards that are none.
    """
    groups: dict[str, tuple[Any, list[tuple[list[int], list[float] | None, dict[str, Any]]]]] = {}
    scored = None
    for number, row in _rows(path):
        where = f"{path}, line {number}"
        prompt = row["prompt_ids"] if "prompt_ids" in row else _prompt(path, number, row, column)
        if "prompt_ids" in row and not _is_ids(prompt):
            raise ConfigError(f"{where}: prompt_ids are a list of one or more token ids, found {_shown(prompt)}")
        completion: Any = row.get("completion_ids")
        logp: Any = row.get("behavior_logp")
        if not _is_ids(completion):
            raise ConfigError(
                f"{where}: completion_ids, the sampled token ids, were expected, found {_shown(completion)} (a text "
                f"can't be turned back into the tokens that were sampled); a line has {ROLLOUT_KEYS}"
            )
        if logp is not None:
            _check_logp(where, logp, len(completion))
        if scored is None:
            scored = logp is not None
        elif scored != (logp is not None):
            raise ConfigError(f"{where}: behavior_logp is given in some lines and not in others: all or none")
        if reward_column:
            _check_reward(where, row, reward_column)
        groups.setdefault(json.dumps(prompt), (prompt, []))[1].append((completion, logp, row))
    if not groups:
        raise ConfigError(f"{path} was given for rollouts, but it has no line: a line has {ROLLOUT_KEYS}")
    single = sum(len(drawn) < 2 for _, drawn in groups.values())
    if single:
        raise ConfigError(
            f"{path}: {single} of {len(groups)} prompts have a single completion, found by equal prompts: at least 2 "
            "of each are needed to tell a mean from noise; leave the others out"
        )
    found = [
        Rollouts(
            prompt=prompt,
            completions=[ids for ids, _, _ in drawn],
            behavior_logp=[logp for _, logp, _ in drawn if logp is not None] if scored else None,
            rewards=[float(row[reward_column]) for _, _, row in drawn] if reward_column else None,
            columns=[_others(row, column) for _, _, row in drawn],
        )
        for prompt, drawn in groups.values()
    ]
    return random.Random(seed).sample(found, limit) if len(found) > limit else found


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read as JSON lines: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{path}, line {number}: a JSON object was expected, found {_shown(line)} ({error}); if the line was "
                "cut off, remove it"
            ) from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: a JSON object was expected, found {_shown(row)}")
        yield number, row


def _prompt(path: Path, number: int, row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise ConfigError(
            f"{path}, line {number}: column {column!r} was asked for, found {', '.join(map(repr, row)) or 'none'}: "
            "name the prompts' column with --prompt-column"
        )
    prompt = row[column]
    is_chat = isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt)
    if not is_chat and not (isinstance(prompt, str) and prompt.strip()):
        raise ConfigError(
            f"{path}, line {number}: {column!r} must be a text that isn't empty, or a chat's list of messages, found "
            f"{_shown(prompt)}"
        )
    return prompt


def _others(row: dict[str, Any], column: str) -> dict[str, Any]:
    """The columns of a line that are none of those read here."""
    return {name: value for name, value in row.items() if name not in (column, *TAKEN)}


def _check_reward(where: str, row: dict[str, Any], column: str) -> None:
    if column not in row:
        raise ConfigError(
            f"{where}: reward column {column!r} was asked for, found {', '.join(map(repr, row))}: name it with "
            "--reward-column, or give a function with --reward"
        )
    if not is_reward(row[column]):
        raise ConfigError(f"{where}: {column!r} is {_shown(row[column])}, and a reward is a finite number")


def is_reward(value: Any) -> bool:
    """Whether it is a finite number (or a bool, which counts as 0 or 1)."""
    return isinstance(value, int | float) and math.isfinite(value)


def _check_logp(where: str, logp: Any, tokens: int) -> None:
    if not isinstance(logp, list) or len(logp) != tokens:
        found = f"{len(logp)} entries" if isinstance(logp, list) else _shown(logp)
        raise ConfigError(f"{where}: behavior_logp needs one log-prob for each of {tokens} tokens, found {found}")
    for index, value in enumerate(logp):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value > 1e-3:
            raise ConfigError(
                f"{where}: behavior_logp[{index}] is {_shown(value)}, not the natural log of a probability: mend what "
                "wrote it, or leave the line out"
            )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
