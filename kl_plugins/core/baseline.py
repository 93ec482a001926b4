"""The leave-one-out baseline: it is subtracted from coefficients and leaves the expected gradient what it was."""

from __future__ import annotations

import torch
from torch import Tensor


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
