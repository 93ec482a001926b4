"""What several modules read off OpenRLHF's training: its tokens, its ranks, and each KL that it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from kl_plugins.errors import PatchError
from kl_plugins.openrlhf.plan import Plan

# Called with (log_probs, log_probs_base, kl), each (B, T).
See = Callable[[Tensor, Tensor, Tensor], None]

_see: ContextVar[See | None] = ContextVar("kl_plugins_see", default=None)


@contextmanager
def seeing(see: See) -> Iterator[None]:
    """While active, `see` is called with each KL that is computed in OpenRLHF's training, by it or by us."""
    token = _see.set(see)
    try:
        yield
    finally:
        _see.reset(token)


def show(log_probs: Tensor, log_probs_base: Tensor, kl: Tensor) -> None:
    """Hand a KL of (B, T) tokens, and the log-probs that it is made of, to the function that `seeing` was given."""
    see = _see.get()
    if see is not None:
        see(log_probs, log_probs_base, kl)


def token_ids(experience: Any) -> Tensor:
    """(B, T). The tokens that the action mask and all log-probs are about: all of a sequence but its first.

    Raises `PatchError` if the mask has another shape.
    """
    ids: Tensor = experience.sequences[:, 1:]
    mask = experience.action_mask
    if ids.shape != mask.shape:
        raise PatchError(
            f"OpenRLHF's action mask was expected to have a place for every token but the first, found "
            f"{tuple(mask.shape)} for sequences of {tuple(experience.sequences.shape)}: install a tested version"
        )
    return ids


def sum_over_ranks(trainer: Any, sums: Tensor) -> Tensor:
    """The sums of all ranks' rows, each row once. A rank without a step calls it all the same: the others wait."""
    copies = trainer.args.ds.ring_attn_size * trainer.args.ds.tensor_parallel_size  # ranks that hold the same rows
    total: Tensor = trainer.strategy.all_reduce(sums.clone(), op="sum") / copies
    return total


def max_over_ranks(trainer: Any, maxima: Tensor) -> Tensor:
    """The elementwise maxima over all ranks. A rank without a step calls it all the same: the others wait for it."""
    largest: Tensor = trainer.strategy.all_reduce(maxima.clone(), op="max")
    return largest


EQUAL_REWARDS = "kl/equal_rewards"


def left_out_of(plan: Plan, experience: Any) -> dict[str, Any]:
    """The masks of what the plan leaves out of the KL, (B, T) each; empty if nothing is left out."""
    if not plan.leaves_out:
        return {}
    mask, rows = experience.action_mask, None
    if plan.leave_out_equal_rewards:
        rows = from_info(experience, EQUAL_REWARDS).to(mask.device)
    return plan.left_out.masks(token_ids(experience), mask, rows)


def from_info(experience: Any, name: str) -> Tensor:
    """(B,). The numbers that the controller's process has put into `experience.info` under this name, one a row.

    Raises `PatchError` if there are none.
    """
    found = experience.info.get(name)
    if found is None:
        raise PatchError(f"an experience came without {name}: it was made in a process without kl_plugins")
    return torch.stack(list(found))
