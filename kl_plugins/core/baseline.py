"""Baselines from a prompt's group: the mean of the other members, and the mean with the own one in it.

Leave-one-out leaves the expected gradient what it was. A mean of all G members has the row's own coefficient in it:
c_i - mean = (1 - 1/G) (c_i - mean of the others). So it is computed, at every position by the same 1 - 1/G, also
where some members have ended; a mean of those that are still there would shrink late positions more than early ones.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_share(baseline: str | None, group_size: int | None) -> float:
    """What a baseline leaves of the expected gradient: 1 - 1/G for `"group_mean"`, of groups of G; else 1.

    Example:
        >>> group_share("group_mean", 4), group_share("leave_one_out", 4)
        (0.75, 1.0)
    """
    return 1 - 1 / group_size if baseline == "group_mean" and group_size else 1.0


def leave_one_out(credited: Tensor, answers: Tensor, group_size: int) -> Tensor:
    """The mean coefficient of the other members of a group at the same position (Ahmadian et al., arXiv 2402.14740).

    Only members that have something to answer for at the position are averaged; where there is none the baseline is
    0. A row's own coefficient has no part in it, not even by rounding.

    Args:
        credited: (B, T), coefficients of the score with credit assigned.
        answers: (B, T) bool, where a row has something to answer for.
        group_size: How many consecutive rows are a group; it divides B.

    Returns:
        (B, T), bounded at the largest finite number.

    Example:
        >>> credited = torch.tensor([[1.0, 4.0], [3.0, 6.0], [8.0, 0.0]])
        >>> leave_one_out(credited, torch.tensor([[True, True], [True, True], [True, False]]), group_size=3)
        tensor([[5.5000, 6.0000],
                [4.5000, 4.0000],
                [2.0000, 5.0000]])
    """
    batch, length = credited.shape
    groups = (batch // group_size, group_size, length)
    others = 1 - torch.eye(group_size, dtype=credited.dtype, device=credited.device)
    with torch.autocast(credited.device.type, enabled=False):  # which would round to half precision
        count = torch.einsum("ij,gjt->git", others, answers.to(credited.dtype).view(*groups))
        mean = torch.einsum("ij,gjt->git", others / group_size, credited.view(*groups))
    largest = torch.finfo(credited.dtype).max
    return (mean * (group_size / count.clamp(min=1))).clamp(-largest, largest).reshape(batch, length)
