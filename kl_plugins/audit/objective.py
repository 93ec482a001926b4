"""What users optimize, E[R] - beta KL, as GRPO and RLOO go about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kl_plugins.core.reward_scale import EPSILON
from kl_plugins.integration.choice import TREATMENTS

if TYPE_CHECKING:
    from torch import Tensor

TRAINERS = ("grpo", "rloo")
"""TRL's; as hosts of `kl_plugins.integration.choice.TREATMENTS`."""
SCALES = ("none", "group")
SCALED_BY_DEFAULT = {"grpo": "group", "rloo": "none"}
"""TRL's own default of `scale_rewards`; `RLOOTrainer` has no such option."""
FEWEST_PROMPTS = 8
"""With fewer, resampling prompts tells too little to call one configuration better than another."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """E[R] - beta KL of one trainer. Gradients are those of its negative, the loss."""

    trainer: str = "grpo"
    """`"grpo"` or `"rloo"`."""
    beta: float = 0.04
    """What a nat of KL costs."""
    scale_rewards: str = "none"
    """`"group"`: rewards are divided by the standard deviation of their group, so that beta counts nats against
    scaled rewards."""
    group_size: int
    """G, completions of a prompt that are baselined together; at least 2."""

    @property
    def baseline(self) -> str:
        """What is subtracted from the rewards, and, if it is treated alike, from a KL in the reward."""
        return TREATMENTS[self.trainer, ""].baseline or ""

    def advantages(self, rewards: Tensor) -> Tensor:
        """(B,) from (B,) rewards: what multiplies the scores, in the unit of the gradient of E[R].

        RLOO subtracts the mean reward of the *others* of a group. GRPO subtracts that of the whole group, which makes
        its advantages 1 - 1/G times these: a factor of its step, which is divided out here, so that trainers and
        terms are compared at the same E[R] - beta KL.

        Example:
            >>> Objective(group_size=2).advantages(torch.tensor([3.0, 1.0, 2.0, 2.0]))
            tensor([ 2., -2.,  0.,  0.])
        """
        groups = rewards.view(-1, self.group_size)
        found = (groups - groups.mean(1, keepdim=True)) * self.group_size / (self.group_size - 1)
        if self.scale_rewards == "group":
            found = found / (groups.std(1, keepdim=True) + EPSILON)
        flat: Tensor = found.flatten()
        return flat

    def beta_to_write(self, shrink: float) -> float:
        """The trainer's `beta` at which a term whose gradient is `shrink` times the KL's optimizes this objective."""
        rewards_shrink = 1 - 1 / self.group_size if self.trainer == "grpo" else 1.0
        return self.beta * rewards_shrink / shrink
