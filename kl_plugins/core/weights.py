"""Importance weights for tokens that another policy sampled, and PPO's clip of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kl_plugins.core.spec import KLSpec


def importance_weight(log_rho: Tensor, mask: Tensor, spec: KLSpec, *, of_state: bool = False) -> tuple[Tensor, Tensor]:
    """The bounded importance weight of each token, and where it was cut.

    With rho_t = pi(y_t) / mu(y_t) and `spec.off_policy`: `"none"` 1, `"token"` rho_t, `"prefix"` prod_{s<=t} rho_s,
    `"sequence"` prod_s rho_s. Outside of the bounds `spec.weight_clip` the product is truncated to them, or 0 with
    `weight_clip_mode="mask"`.

    Args:
        log_rho: (B, T), nats, log pi(y_t) - log mu(y_t); 0 where the token doesn't count.
        mask: (B, T) bool.
        spec: `off_policy`, `weight_clip` and `weight_clip_mode` are read.
        of_state: For a term that was summed over the vocabulary and depends on the prefix only: without the token's
            own ratio. `"token"` is then 1, and `"prefix"` is prod_{s<t} rho_s.

    Returns:
        Weights (B, T), 0 where masked; and (B, T) bool, True where a counted token's weight was outside of the bounds.
        An unbounded weight saturates at the square root of the largest finite number, so that its square is finite.

    Example:
        >>> log_rho = torch.tensor([[2.0, 0.5, 4.0]]).log()
        >>> spec = KLSpec.from_name("k2_as_loss", off_policy="prefix", weight_clip=(0.0, 3.0))
        >>> importance_weight(log_rho, torch.ones(1, 3, dtype=torch.bool), spec)
        (tensor([[2., 1., 3.]]), tensor([[False, False,  True]]))
    """
    if spec.off_policy == "prefix":
        log_rho = torch.nn.functional.pad(log_rho, (1, 0))[:, :-1] if of_state else log_rho
        log_rho = log_rho.cumsum(-1)
    elif spec.off_policy == "sequence":
        log_rho = log_rho.sum(-1, keepdim=True).expand_as(log_rho)
    elif spec.off_policy == "none" or of_state:
        log_rho = torch.zeros_like(log_rho)
    low, high = spec.weight_clip
    high = min(high, math.sqrt(torch.finfo(log_rho.dtype).max))
    ratio = log_rho.exp()
    cut = mask & ((ratio < low) | (ratio > high))
    ratio = ratio.clamp(low, high) if spec.weight_clip_mode == "truncate" else ratio.masked_fill(cut, 0)
    return torch.where(mask, ratio, 0.0), cut


def ppo_clip(weight: Tensor, cut: Tensor, log_rho: Tensor, cost: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`weight` and `cut` with weight 0 where PPO's clipped objective has no gradient.

    The objective of a cost c is max(rho c, clip(rho, 1 - epsilon, 1 + epsilon) c), that of PPO (Schulman et al., arXiv
    1707.06347, equation 7) for the advantage -c. Its gradient is 0 where rho < 1 - epsilon and c > 0, and where
    rho > 1 + epsilon and c < 0. All tensors are (B, T).
    """
    rho = log_rho.exp()
    clipped = ((cost > 0) & (rho < 1 - epsilon)) | ((cost < 0) & (rho > 1 + epsilon))
    return weight.masked_fill(clipped, 0), cut | clipped
