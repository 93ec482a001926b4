"""At the best policy of E[R] - beta KL a KL treated as the reward is leaves nothing: not one group has a gradient.

That is why it wins where the KL with less noise of its own doesn't: at the optimum R - beta log(policy / reference) is
the same for every completion (docs/theory.md, "Reward and KL together").
"""

import pytest
import torch

from kl_plugins import KLSpec, exact_kl, kl_terms, oracle

BETA = 0.3
ALL = oracle.enumerate_sequences(3, 3)
GROUP = 4


def optimum(reference, rewards):
    """(S, V) logits of reference * exp(R / beta) / Z: a token's weight is that of the sequences that go on with it."""
    weight = oracle.sequence_probability(reference, ALL) * (rewards / BETA).exp()
    table = torch.zeros(ALL.prefixes, ALL.vocabulary, dtype=torch.float64)
    rows, positions = ALL.mask.nonzero(as_tuple=True)
    table.index_put_((ALL.prefix[rows, positions], ALL.tokens[rows, positions]), weight[rows], accumulate=True)
    table[table.sum(-1) == 0] = 1.0  # a prefix behind the end of a sequence: any distribution will do
    return table.log()


def largest_coefficients(policy, reference, rewards, **options):
    """The largest |advantage - beta * coefficient| of many groups, with GRPO's advantages, and of the KL alone."""
    generator = torch.Generator().manual_seed(0)
    rows = oracle.sequence_probability(policy, ALL).multinomial(64 * GROUP, replacement=True, generator=generator)
    spec = KLSpec.from_name(baseline="group_mean", **options)
    mask, prefix = ALL.mask[rows], ALL.prefix[rows]
    exact = None
    if spec.loss.exact:
        exact = exact_kl(spec, logits=policy[prefix], ref_logits=reference[prefix], mask=mask)
    logp, ref_logp = (oracle.token_logp(logits, ALL)[rows] for logits in (policy, reference))
    terms = kl_terms(spec, logp=logp, ref_logp=ref_logp, mask=mask, group_size=GROUP, exact=exact)
    reward = rewards[rows].view(-1, GROUP)
    advantage = (reward - reward.mean(1, keepdim=True)).view(-1, 1) * mask
    return (advantage - BETA * terms.coefficient).abs().max().item(), BETA * terms.coefficient.abs().max().item()


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(ALL.prefixes, ALL.vocabulary, dtype=torch.float64, generator=generator)
    rewards = torch.rand(len(ALL.tokens), dtype=torch.float64, generator=generator)
    return optimum(reference, rewards), reference, rewards


def test_the_optimum_is_one(problem):
    """No step away from it has a higher E[R] - beta KL."""
    policy, reference, rewards = problem

    def objective(logits):
        log_ratio = ((oracle.token_logp(logits, ALL) - oracle.token_logp(reference, ALL)) * ALL.mask).sum(-1)
        return (oracle.sequence_probability(logits, ALL) * (rewards - BETA * log_ratio)).sum()

    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        step = 0.1 * torch.randn(policy.shape, dtype=torch.float64, generator=generator)
        assert objective(policy + step) < objective(policy)


def test_at_the_optimum_nothing_is_left(problem):
    whole, of_kl = largest_coefficients(*problem, name="k1_in_reward", credit="sequence")
    assert of_kl > 0.1
    assert whole < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"name": "k1_in_reward", "credit": "to_go"},
        {"name": "k1_in_reward", "credit": "token"},
        {"name": "k3_as_loss"},
        {"name": "exact_in_reward"},
    ],
)
def test_with_any_other_credit_or_kl_the_rewards_noise_stays(problem, options):
    whole, _ = largest_coefficients(*problem, **options)
    assert whole > 0.1


def test_with_another_beta_it_stays_as_well(problem):
    """The twin: leave-one-out beside GRPO's advantages counts beta G / (G - 1) times."""
    policy, reference, rewards = problem
    whole, _ = largest_coefficients(
        policy, reference, rewards * (GROUP - 1) / GROUP, name="k1_in_reward", credit="sequence"
    )
    assert whole > 0.01
