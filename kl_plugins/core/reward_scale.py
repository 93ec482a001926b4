"""What rewards are divided by, for a KL that is to be divided by the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads the number without torch
    from torch import Tensor

EPSILON = 1e-4
"""What is added to a standard deviation before it divides."""


def reward_scale(rewards: Tensor, group_size: int, *, per: str) -> Tensor:
    """(B,) 1 / (standard deviation + 1e-4), as GRPO multiplies its advantages.

    A group of equal rewards, or of a deviation below that 1e-4, has no scale of its own (1e4 would multiply its KL):
    it gets that of the batch; such a batch has the scale 1.

    Args:
        rewards: (B,), NaN where a completion could not be scored; groups are consecutive rows.
        group_size: Completions per prompt; it divides B.
        per: `"group"`, or `"batch"` for one scale.

    Example:
        >>> import torch
        >>> rewards = torch.tensor([0.0, 2.0, 1.0, 1.0])
        >>> reward_scale(rewards, 2, per="group"), reward_scale(torch.ones(2), 2, per="group")
        (tensor([0.7071, 0.7071, 1.2246, 1.2246]), tensor([1., 1.]))
    """
    scale = _scale(rewards.view(1, -1)).nan_to_num(nan=1.0).expand(len(rewards))
    if per == "group":
        groups = _scale(rewards.view(-1, group_size)).repeat_interleave(group_size)
        scale = groups.where(~groups.isnan(), scale)
    return scale.to(rewards.dtype)


def _scale(rewards: Tensor) -> Tensor:
    """(groups,) of (groups, n): 1 / (unbiased deviation + 1e-4), NaN left out; NaN where they are about equal."""
    rewards = rewards.double()
    count = (~rewards.isnan()).sum(-1)
    squares = (rewards - rewards.nanmean(-1, keepdim=True)).square().nansum(-1)
    deviation = (squares / (count - 1)).sqrt()
    rounding = 1e-6 * rewards.abs().nan_to_num(nan=0.0).amax(-1).clamp(min=1)
    return (1 / (deviation + EPSILON)).masked_fill(~(deviation > rounding.clamp(min=EPSILON)), float("nan"))
