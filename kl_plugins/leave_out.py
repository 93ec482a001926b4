"""Which tokens `kl_leave_out` leaves out of the KL: words and texts, resolved with the run's tokenizer.

A token that the policy didn't draw (padding, a tool's answer) is in no KL anyway.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kl_plugins.errors import ConfigError, refuse

if TYPE_CHECKING:  # options are read, and explained, without torch
    from torch import Tensor

WORDS = ("eos", "special", "first")


@dataclass(frozen=True)
class LeftOut:
    """What is left out of the KL of a run."""

    token_ids: tuple[int, ...] = ()
    """Tokens, wherever they stand."""
    first: bool = False
    """The first token of each completion, whichever it is."""

    def masks(self, token_ids: Tensor, mask: Tensor, rows: Tensor | None = None) -> dict[str, Any]:
        """The arguments of `kl_terms` for (B, T) tokens that count where `mask` is 1; `rows` (B,): whole sequences."""
        import torch

        masks: dict[str, Any] = {}
        if self.token_ids:
            masks["left_out_tokens"] = torch.isin(token_ids, torch.tensor(self.token_ids, device=token_ids.device))
        if self.first or rows is not None:
            positions = torch.zeros_like(mask, dtype=torch.bool)
            if self.first:
                positions |= (mask.cumsum(-1) == 1) & mask.bool()
            if rows is not None:
                positions |= rows.bool().unsqueeze(-1)
            masks["left_out_positions"] = positions
        return masks


def left_out(words: Sequence[str | int], *, tokenizer: Any, eos_token_id: int | Collection[int] | None) -> LeftOut:
    """`kl_leave_out` for a tokenizer (Hugging Face's).

    Each is `"eos"` (every token that ends a completion), `"special"` (the tokenizer's special tokens, those of its
    chat template among them), `"first"`, or a token's id or text (`"id:5"`, `"text:5"` where it may be both). Raises
    `ConfigError` for what is no single token.
    """
    ids: set[int] = set()
    problems: list[str] = []
    for word in words:
        if word == "eos":
            ids |= eos_ids(tokenizer, eos_token_id)
        elif word == "special":
            ids |= special_ids(tokenizer)
        elif word != "first":
            try:
                ids.add(_token_id(word, tokenizer))
            except ConfigError as error:
                problems += error.args
    refuse(problems)
    return LeftOut(token_ids=tuple(sorted(ids)), first="first" in words)


def eos_ids(tokenizer: Any, eos_token_id: int | Collection[int] | None) -> set[int]:
    """The tokens that end a completion: the tokenizer's, and those of the generation config."""
    also = {eos_token_id} if eos_token_id is None or isinstance(eos_token_id, int) else set(eos_token_id)
    return {int(index) for index in {tokenizer.eos_token_id, *also} - {None}}


def special_ids(tokenizer: Any) -> set[int]:
    """The tokens that mark text instead of being some, ends included."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added}


def token_classes(tokenizer: Any, eos_token_id: int | Collection[int] | None) -> list[int]:
    """Token id -> index into `monitor.CLASSES`: text, ends of a completion, other special tokens; the last is text."""
    eos, special = eos_ids(tokenizer, eos_token_id), special_ids(tokenizer)
    return [1 if index in eos else 2 if index in special else 0 for index in range(max(eos | special, default=-1) + 2)]


def equal_reward_rows(rewards: Tensor, group_size: int) -> Tensor:
    """(B,) bool: rows whose whole group (consecutive rows) has the same rewards, up to float32's rounding.

    `rewards` is (B,) or (B, functions), NaN where a function gave none. A group of one is never left out.
    """
    groups = rewards.reshape(-1, group_size, rewards[:1].numel()).double()
    some = groups.nan_to_num(nan=0.0)
    close = some.amax(1) - some.amin(1) <= 1e-6 * some.abs().amax(1).clamp(min=1)
    equal = close & (groups.isnan() == groups[:, :1].isnan()).all(1)
    return (equal.all(-1) & (group_size > 1)).repeat_interleave(group_size)


def _token_id(word: str | int, tokenizer: Any) -> int:
    kind, _, rest = str(word).partition(":")
    kind, text = (kind, rest) if kind in ("id", "text") and rest else ("", str(word))
    vocabulary = tokenizer.get_vocab()
    if kind == "id" or (not kind and text.lstrip("-").isdigit()):
        if not text.isdigit() or int(text) >= len(tokenizer):
            raise ConfigError(f"kl_leave_out has the token id {text}: the tokenizer has 0 to {len(tokenizer) - 1}")
        if not kind and vocabulary.get(text, int(text)) != int(text):
            raise ConfigError(
                f"kl_leave_out has {text!r}, a token id and the text of token {vocabulary[text]}: write "
                f"'id:{text}' or 'text:{text}'"
            )
        return int(text)
    if text in vocabulary:
        return int(vocabulary[text])
    pieces = tokenizer.encode(text, add_special_tokens=False)
    if len(pieces) == 1 and pieces[0] != getattr(tokenizer, "unk_token_id", None):
        return int(pieces[0])
    raise ConfigError(
        f"kl_leave_out has {text!r}, which is {len(pieces)} tokens ({pieces}) of this tokenizer, or an unknown one: "
        f"name a single token, its id, or one of {', '.join(WORDS)}"
    )


def words_of(value: str | int | Iterable[str | int] | None) -> list[str]:
    """A list, from a list, one word or nothing: YAML and dictionaries have all of them."""
    if value is None:
        return []
    items = [value] if isinstance(value, str | int) else list(value)
    return [str(item) for item in items]
