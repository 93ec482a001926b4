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
    """What each token costs as a reward, of which the host's returns make the credit that `spec` asks for.

    Args:
        spec: A sampled configuration; its coefficient, `coefficient_bound` and credit are read.
        terms: `kl_terms` of the batch.

    Returns:
        (B, T), detached, 0 where masked. With credit `"to_go"` each token costs what it is (for k1 the log-ratio, in
        nats). With `"sequence"` the sum of all stands at the last counted token, where an outcome reward stands, and
        undiscounted returns hand it to every token.
    """
    bound = spec.coefficient_bound or torch.finfo(terms.log_ratio.dtype).max
    cost = torch.where(terms.mask, spec.loss.coefficient(terms.log_ratio).clamp(-bound, bound), 0.0)
    return as_costs(assign_credit(cost, "sequence"), mask=terms.mask) if spec.credit == "sequence" else cost


def as_costs(coefficient: Tensor, *, mask: Tensor) -> Tensor:
    """(B, T) costs of single tokens whose undiscounted sums from each counted token on are its `coefficient`.

    Both arguments are (B, T), `mask` bool. A counted token costs the difference to the next one that counts, the last
    all that it has; what is masked costs nothing.

    Example:
        >>> mask = torch.tensor([[True, False, True, False]])
        >>> as_costs(torch.tensor([[5.0, 0.0, 3.0, 0.0]]), mask=mask)
        tensor([[2., 0., 3., 0.]])
    """
    length = mask.size(1)
    place = torch.where(mask, torch.arange(length, device=mask.device), length)
    following = torch.nn.functional.pad(place, (0, 1), value=length)[:, 1:].flip(1).cummin(1).values.flip(1)
    next_one = torch.nn.functional.pad(coefficient, (0, 1)).gather(1, following)
    return torch.where(mask, coefficient - next_one, 0.0)


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
        discount: What one position is discounted with between a reward and the advantage (gamma, for GAE gamma * lam);
            1 with credit `"sequence"`.
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
