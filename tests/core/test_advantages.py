"""A KL in the reward that follows the policy: advantages as if the rollout had been scored by the current one."""

from dataclasses import replace

import pytest
import torch

from kl_plugins import KLSpec, kl_terms
from kl_plugins.core.advantages import as_costs, refresh_advantages, token_penalty

SPEC = KLSpec.from_name("k1_in_reward")


def batch(seed=0, rows=4, length=5):
    generator = torch.Generator().manual_seed(seed)

    def draw(scale=1.0):
        return scale * torch.randn(rows, length, dtype=torch.float64, generator=generator)

    mask = torch.arange(length) < torch.tensor([[5], [3], [4], [1]])
    then, ref_logp = draw(), draw()
    now = then + draw(0.3)
    return [kl_terms(SPEC, logp=logp, ref_logp=ref_logp, mask=mask) for logp in (now, then)], draw(), mask


def returns(rewards, discount):
    """sum_{s>=t} discount^(s-t) r_s, one term at a time."""
    found = torch.zeros_like(rewards)
    for t in range(rewards.size(1)):
        for s in range(t, rewards.size(1)):
            found[:, t] += discount ** (s - t) * rewards[:, s]
    return found


def test_what_a_token_costs_is_its_own_coefficient():
    (now, _), _, mask = batch()
    assert torch.equal(token_penalty(SPEC, now), torch.where(mask, now.log_ratio, 0.0))
    k3 = KLSpec.from_name("k3_in_reward", allow_biased=True)
    large = replace(now, log_ratio=torch.full_like(now.log_ratio, -50.0))
    bounded = token_penalty(replace(k3, coefficient_bound=7.0), large)
    assert torch.equal(bounded, torch.where(mask, 7.0, 0.0).double())  # a masked token costs nothing
    assert token_penalty(k3, large).max() > 1e20


def test_undiscounted_returns_of_costs_are_the_coefficients_that_they_were_made_of():
    generator = torch.Generator().manual_seed(1)
    coefficient = torch.randn(64, 6, dtype=torch.float64, generator=generator)
    mask = torch.rand(64, 6, generator=generator) < 0.6  # with gaps, ends and rows without any token
    costs = as_costs(coefficient, mask=mask)
    torch.testing.assert_close(returns(costs, 1.0)[mask], coefficient[mask])
    assert torch.equal(costs[~mask], torch.zeros_like(costs)[~mask])
    assert (returns(costs, 0.9) - coefficient)[mask].abs().max() > 0.1


def test_with_credit_sequence_the_whole_sum_stands_at_the_last_counted_token():
    (now, _), _, mask = batch()
    spec = replace(SPEC, credit="sequence")
    costs = token_penalty(spec, now)
    last = mask & ~torch.nn.functional.pad(mask, (0, 1))[:, 1:]
    torch.testing.assert_close(costs, torch.where(last, now.log_ratio.sum(-1, keepdim=True), 0.0))


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_returns_are_those_of_the_current_policys_kl(discount):
    (now, then), rewards, mask = batch()
    beta, rewards = 0.3, rewards * mask
    at_rollout = returns(rewards - beta * token_penalty(SPEC, then), discount)
    found = refresh_advantages(
        at_rollout, spec=SPEC, now=now, then=then, discount=discount, scale=beta, normalized=False
    )
    expected = returns(rewards - beta * token_penalty(SPEC, now), discount)
    torch.testing.assert_close(found, expected)
    assert (at_rollout - expected).abs().max() > 0.1  # it was another policy's


@pytest.mark.parametrize("normalized", [False, True])
def test_an_unmoved_policy_changes_nothing(normalized):
    (_, then), advantages, _ = batch()
    options = {"discount": 1.0, "scale": 0.3, "normalized": normalized}
    assert torch.equal(refresh_advantages(advantages, spec=SPEC, now=then, then=then, **options), advantages)


def test_normalized_advantages_stay_normalized():
    """Their mean square stays 1 although the change, which isn't correlated with them, adds to it."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(64, 32)
    then_logp, ref_logp, moved, advantages = torch.randn(4, 64, 32, dtype=torch.float64, generator=generator)
    then, now = (kl_terms(SPEC, logp=x, ref_logp=ref_logp, mask=mask) for x in (then_logp, then_logp + moved))
    options = {"spec": SPEC, "now": now, "then": then, "discount": 0.0, "scale": 2.0}
    found = refresh_advantages(advantages, normalized=True, **options)
    assert found.square().mean() == pytest.approx(1, abs=0.05)
    plain = refresh_advantages(advantages, normalized=False, **options)
    assert plain.square().mean() > 4
    torch.testing.assert_close(found / found.norm(), plain / plain.norm())
