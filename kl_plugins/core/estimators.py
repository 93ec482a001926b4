"""The pointwise part of every configuration: k1, k2, k3 and their coefficients.

Functions of `log_ratio` u = `logp - ref_logp` (any shape, nats) and nothing else: they do not detach, clamp, mask or
reduce. What they return has its shape; none raises. Under samples of the current policy k1 and k3 are unbiased
estimates of the local reverse KL and k2 is a biased one (Schulman, "Approximating KL Divergence", 2020), which says
nothing about their gradients.

A coefficient multiplies the score grad log pi(y_t). "k_n as loss" is d k_n / d logp, "k_n in reward" is k_n itself
(Liu et al., arXiv 2510.01555).

    >>> import torch
    >>> u = torch.tensor([-1.0, 0.0, 2.0])
    >>> k2(u), k3(u)
    (tensor([0.5000, 0.0000, 2.0000]), tensor([0.7183, 0.0000, 1.1353]))
    >>> k3_derivative(u)
    tensor([-1.7183,  0.0000,  0.8647])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """`u`: unbiased, high variance, can be negative. Also the coefficient of `k1_in_reward` and `k2_as_loss`."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """`u^2 / 2`: biased as a value; its derivative `u` is an unbiased coefficient of the local reverse KL."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """`exp(-u) - 1 + u`: unbiased, never negative. Overflows to inf below u = -88 (float32)."""
    small = log_ratio.clamp(-0.5, 0.5)
    series = small.new_ones(small.shape)
    for n in range(14, 2, -1):  # where the terms of the closed form cancel: u^2/2 - u^3/6 + ..., to 1e-14
        series = 1 - small / n * series
    closed = (-log_ratio).expm1() + log_ratio
    return (small.square() / 2 * series).where(log_ratio == small, closed)


def k1_derivative(log_ratio: Tensor) -> Tensor:
    """`1`: the expected score is zero, so this regularizes nothing."""
    return log_ratio.new_ones(log_ratio.shape)


def k3_derivative(log_ratio: Tensor) -> Tensor:
    """`1 - exp(-u)` as `-expm1(-u)`: the local *forward* KL. -inf below u = -88 (float32): the caller bounds it."""
    return -(-log_ratio).expm1()


def k1_plus_one(log_ratio: Tensor) -> Tensor:
    """`u + 1`: of a token that stands for those a head leaves out, d (sum of p u over them) / d logp. Not `u`: the
    expected score of a part of the vocabulary isn't zero but the gradient of its mass."""
    return log_ratio + 1


def forward_k1(log_ratio: Tensor) -> Tensor:
    """`-u exp(-u)`: under samples of the current policy, an unbiased estimate of the local forward KL."""
    return -log_ratio * (-log_ratio).exp()


def forward_tail_coefficient(log_ratio: Tensor) -> Tensor:
    """`-exp(-u)`: of a token that stands for those a head leaves out, d (sum of -r u over them) / d logp."""
    return -(-log_ratio).exp()
