"""What a host divides its rewards by, for a KL that is to be divided by the same (`kl_scale="reward"`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # options are read, and explained, without torch
    from torch import Tensor

SCALES = ("none", "reward")
EPSILON = 1e-4
"""What TRL adds to a standard deviation before it divides by it."""


def reward_scale(rewards: Tensor, group_size: int, *, per: str) -> Tensor:
    """(B,) 1 / (standard deviation + 1e-4), as TRL's GRPO multiplies its advantages.

    A group of equal rewards has no scale of its own (1e4 would multiply its KL, and its advantages are 0): it gets
    that of the batch; a batch of equal rewards has the scale 1.

    Args:
        rewards: (B,), NaN where a completion could not be scored; groups are consecutive rows.
        group_size: Completions per prompt; it divides B.
        per: `"group"`, or `"batch"` for one scale.

    Example:
        >>> import torch
        >>> rewards = torch.tensor([0.0, 2.0, 1.0, 1.0])
        >>> reward_scale(rewards, 2, per="group"), reward_scale(torch.ones(2), 2, per="group")
        (tensor([0.7071, 1.2246, 1.2246]), tensor([1., 1.]))
    """
    scale = _scale(rewards.view(1, -1)).nan_to_num(nan=1.0).expand(len(rewards))
    if per == "group":
        groups = _scale(rewards.view(-1, group_size)).repeat_interleave(group_size)
        scale = groups.where(~groups.isnan(), scale)
    return scale.to(rewards.dtype)


def _scale(rewards: Tensor) -> Tensor:
    """(groups,) of (groups, n): 1 / (unbiased deviation + 1e-4), NaN left out; NaN where all are equal, or rounded."""
    rewards = rewards.double()
    count = (~rewards.isnan()).sum(-1)
    squares = (rewards - rewards.nanmean(-1, keepdim=True)).square().nansum(-1)
    deviation = (squares / (count - 1)).sqrt()
    rounding = 1e-6 * rewards.abs().nan_to_num(nan=0.0).amax(-1).clamp(min=1)
    return (1 / (deviation + EPSILON)).masked_fill(~(deviation > rounding), float("nan"))


def scaling(settings: Any) -> str:
    """How the rewards of a config of TRL's GRPO or RLOO are divided: in words; empty if they aren't."""
    if getattr(settings, "normalize_advantages", False):
        return "normalize_advantages=True divides the advantages by the batch's standard deviation"
    if getattr(settings, "multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        return "multi_objective_aggregation='normalize_then_sum' divides rewards by several standard deviations"
    per = getattr(settings, "scale_rewards", "none")
    return "" if per == "none" else f"scale_rewards={per!r} divides rewards by the standard deviation of their {per}"


def meaning_of_beta(settings: Any) -> str:
    """What beta counts in a config of TRL's GRPO or RLOO whose rewards are divided; empty if they aren't."""
    how = scaling(settings)
    if not how:
        return ""
    if settings.kl_scale == "reward":
        return f"{how}, and kl_scale='reward' the KL with them: beta counts nats against rewards as they were given"
    return f"{how}, and not the KL: beta counts nats against rewards in units of that deviation (or kl_scale='reward')"
