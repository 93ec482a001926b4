"""A KL in the reward: what a token costs, and how advantages that hold it follow the policy over several updates.

The advantages of a rollout hold the coefficients of the policy at rollout. Reused for a later update they give
grad KL(policy || reference) - grad KL(policy || policy at rollout). Returns and GAE are linear in the rewards, so that
what a token's cost has changed by is summed up as they do it, and subtracted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kl_plugins.core.spec import KLSpec
from kl_plugins.core.terms import KLTerms, assign_credit


def token_penalty(spec: KLSpec, terms: KLTerms) -> Tensor:
    """What each token costs as a reward: coefficients before credit is assigned.

    Args:
        spec: A sampled configuration; its coefficient and `coefficient_bound` are read.
        terms: `kl_terms` of the batch.

    Returns:
        (B, T), detached. For k1 in reward it is the log-ratio, in nats. 0 where masked.
    """
    bound = spec.coefficient_bound or torch.finfo(terms.log_ratio.dtype).max
    return torch.where(terms.mask, spec.loss.coefficient(terms.log_ratio).clamp(-bound, bound), 0.0)


def refresh_advantages(
    advantages: Tensor,
    *,
    spec: KLSpec,
    now: KLTerms,
    then: KLTerms,
    discount: float,
    scale: float | Tensor,
    normalized: bool,
) -> Tensor:
    """(B, T) `advantages` of a rollout with the KL of the current policy in them instead of that at rollout.

    Args:
        advantages: (B, T), the host's own, with the KL at rollout in the rewards that they were made of.
        spec: The configuration.
        now: `kl_terms` of the current policy.
        then: `kl_terms` of the policy at rollout.
        discount: What one position is discounted with between a reward and the advantage (gamma, for GAE gamma * lam).
        scale: What a nat was multiplied with on its way into the advantages: beta, times what the host's
            normalization did.
        normalized: Whether the host divided the advantages by their standard deviation. They stay normalized then:
            the variance that the change adds is divided out again. Else a batch of equal rewards, whose tiny KL was
            scaled up to variance 1, would have its KL scaled up as much once the policy has moved.
    """
    changed = scale * assign_credit(token_penalty(spec, now) - token_penalty(spec, then), "to_go", discount)
    if not normalized:
        return advantages - changed
    added = torch.where(now.mask, changed, 0.0).square().sum() / now.mask.sum().clamp(min=1)
    return (advantages - changed) / (1 + added).sqrt()
