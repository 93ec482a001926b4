"""Which tokens `kl_leave_out` leaves out of the KL: words and texts, resolved with the run's tokenizer.

A token that the policy didn't draw (padding, a tool's answer) is in no KL anyway.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kl_plugins.errors import ConfigError, refuse
from kl_plugins.integration.tokenizers import eos_ids, special_ids, token_id

if TYPE_CHECKING:  # options are read, and explained, without torch
    from torch import Tensor


@dataclass(frozen=True)
class LeaveOut:
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


def resolve_leave_out(
    words: Sequence[str | int], *, tokenizer: Any, eos_token_id: int | Collection[int] | None
) -> LeaveOut:
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
                ids.add(token_id(word, tokenizer))
            except ConfigError as error:
                problems += error.args
    refuse(problems)
    return LeaveOut(token_ids=tuple(sorted(ids)), first="first" in words)


def equal_reward_rows(rewards: Tensor, group_size: int) -> Tensor:
    """(B,) bool: rows whose whole group (consecutive rows) has the same rewards, up to float32's rounding.

    `rewards` is (B,) or (B, functions), NaN where a function gave none. A group of one is never left out.
    """
    groups = rewards.reshape(-1, group_size, rewards[:1].numel()).double()
    some = groups.nan_to_num(nan=0.0)
    close = some.amax(1) - some.amin(1) <= 1e-6 * some.abs().amax(1).clamp(min=1)
    equal = close & (groups.isnan() == groups[:, :1].isnan()).all(1)
    return (equal.all(-1) & (group_size > 1)).repeat_interleave(group_size)


def words_of(value: str | int | Iterable[str | int] | None) -> list[str]:
    """A list, from a list, one word or nothing: YAML and dictionaries have all of them."""
    if value is None:
        return []
    items = [value] if isinstance(value, str | int) else list(value)
    return [str(item) for item in items]
