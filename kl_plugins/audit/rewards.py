"""A user's reward function, called as TRL calls it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kl_plugins.audit.data import Rollouts, is_reward
from kl_plugins.errors import ConfigError

RewardFunction = Callable[..., Sequence[float]]


def load_reward(name: str) -> RewardFunction:
    """The function that `package.module:function` or `path/to/file.py:function` names.

    Raises `ConfigError` if there is none.
    """
    where, separator, function = name.rpartition(":")
    if not separator or not where or not function:
        raise ConfigError(
            f"--reward {name}: give package.module:function or file.py:function; saved rewards are read with "
            "--reward-column"
        )
    try:
        module = _of_file(Path(where)) if where.endswith(".py") else _of_package(where)
    except (ImportError, OSError) as error:
        raise ConfigError(f"--reward {name}: {where} can't be imported: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        functions = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(
            f"--reward {name}: {where} has no function {function}; it has {', '.join(functions) or 'none'}"
        )
    loaded: RewardFunction = found
    return loaded


def _of_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _of_package(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:  # a console script's path has its own folder instead
        sys.path.insert(0, here)
    return importlib.import_module(name)


def rewards_of(
    function: RewardFunction, name: str, texts: Callable[[Sequence[list[int]]], list[str]]
) -> Callable[[Rollouts], list[float]]:
    """The rewards of rollouts by a function that gets what TRL gives one, as far as it has parameters for it.

    That is `prompts`, `completions` (texts, or messages where the prompt is a chat), `completion_ids`, the other
    columns of the rows, and what TRL adds for training: `trainer_state` is None, and `log_extra` and `log_metric` do
    nothing.

    Args:
        function: As in `GRPOTrainer(reward_funcs=...)`.
        name: For messages.
        texts: Texts of token ids, special tokens left out.

    The returned function raises `ConfigError` unless there is one finite number for each completion.
    """
    parameters = inspect.signature(function).parameters.values()
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)

    def rewards(rollouts: Rollouts) -> list[float]:
        count, prompt = len(rollouts.completions), rollouts.prompt
        completions: list[Any] = texts(rollouts.completions)
        if isinstance(prompt, list) and isinstance(prompt[0], dict):
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        elif isinstance(prompt, list):
            (prompt,) = texts([prompt])
        given: dict[str, Any] = {
            name: [row.get(name) for row in rollouts.columns] for name in dict.fromkeys(_names(rollouts))
        }
        given |= {"prompts": [prompt] * count, "completions": completions, "completion_ids": rollouts.completions}
        given |= {"trainer_state": None, "log_extra": _log_nothing, "log_metric": _log_nothing}
        if not anything:
            given = {p.name: given[p.name] for p in parameters if p.name in given}
        found = list(function(**given))
        if len(found) != count or not all(map(_is_number, found)):
            raise ConfigError(
                f"{name} was called with {count} completions and returned {found!r:.200}: a reward function returns "
                "one finite number for each completion"
            )
        return [float(value) for value in found]

    return rewards


def _names(rollouts: Rollouts) -> list[str]:
    return [name for row in rollouts.columns for name in row]


def _log_nothing(*_: Any) -> None:
    """What a reward function logs isn't kept."""


def _is_number(value: Any) -> bool:
    return is_reward(value.item() if hasattr(value, "item") else value)


__all__ = ["load_reward", "rewards_of"]
