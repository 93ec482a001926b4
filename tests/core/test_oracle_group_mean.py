"""`baseline="group_mean"`, by enumerating every group: the KL keeps its proportion to rewards that GRPO centres."""

import pytest
import torch

from kl_plugins import ConfigError, KLSpec, kl_terms, leave_one_out_baseline, oracle
from kl_plugins.oracle import RTOL, expected_gradient, relative_error

BETA = 0.3
SMALL = oracle.enumerate_sequences(3, 3)
TINY = oracle.enumerate_sequences(2, 2)  # [0], [1, 0] and [1, 1]: ragged
UNBOUNDED = (0.0, float("inf"))
SPECS = [
    ("k1_in_reward", "token"),
    ("k1_in_reward", "to_go"),
    ("k1_in_reward", "sequence"),
    ("k2_as_loss", "token"),
    ("k2_as_loss", "sequence"),
    ("k3_as_loss", "token"),
    ("exact_in_reward", "to_go"),
]


@pytest.mark.parametrize("off", [None, "token", "prefix", "sequence"])
@pytest.mark.parametrize(("name", "credit"), SPECS)
def test_the_expected_gradient_is_shrunk_at_every_position_alike(name, credit, off):
    """1 - 1/G times the one without a baseline, on- and off-policy, though late positions have fewer members."""
    policy, reference, behavior = oracle.structured_policies(SMALL, seed=1, strength=2.0)
    options = {"credit": credit} | ({} if off is None else {"off_policy": off, "weight_clip": UNBOUNDED})
    policies = {"sequences": SMALL, "policy": policy, "reference": reference}
    policies |= {"behavior": None if off is None else behavior}
    plain = expected_gradient(KLSpec.from_name(name, **options), **policies)
    for group_size in (2, 3):
        found = {
            baseline: expected_gradient(
                KLSpec.from_name(name, baseline=baseline, **options), **policies, group_size=group_size
            )
            for baseline in ("group_mean", "leave_one_out")
        }
        wanted = (1 - 1 / group_size) * plain
        assert relative_error(found["group_mean"], wanted) <= RTOL
        assert relative_error(found["leave_one_out"], wanted) > 0.3


def tiny():
    """(S, V) logits of a policy and a reference, and (N,) rewards, over the three sequences of `TINY`."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, TINY.prefixes, 2, dtype=torch.float64, generator=generator)
    return policy, reference, torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)


def log_ratio(policy, reference):
    """(N, T), 0 where no token was drawn."""
    return torch.where(TINY.mask, oracle.token_logp(policy, TINY) - oracle.token_logp(reference, TINY), 0.0)


def gradient_of_objective(policy, reference, rewards):
    """(S, V): grad E[R] - beta KL, by differentiating the sum over all sequences."""
    theta = policy.clone().requires_grad_()
    objective = rewards - BETA * log_ratio(theta, reference).sum(-1)
    return torch.autograd.grad((oracle.sequence_probability(theta, TINY) * objective).sum(), theta)[0]


def gradient_of_surrogate(coefficients, policy, group_size):
    """(S, V): E[1/G sum_i sum_t a_it score_it] over every group of G, for `coefficients(members)`, (groups, G, T)."""
    members = torch.cartesian_prod(*[torch.arange(len(TINY.tokens))] * group_size)
    theta = policy.clone().requires_grad_()
    probability = oracle.sequence_probability(policy, TINY)[members].prod(-1)
    logp = (oracle.token_logp(theta, TINY) * TINY.mask)[members]
    surrogate = (coefficients(members) * logp).sum((1, 2)) / group_size
    return torch.autograd.grad((probability * surrogate).sum(), theta)[0]


def kl_coefficients(baseline, credit, policy, reference):
    """Those of `kl_terms`, as GRPO's loss adds them: minus beta times them is what the advantage gets."""
    spec = KLSpec.from_name("k1_in_reward", credit=credit, baseline=baseline)
    logp, ref_logp = (oracle.token_logp(logits, TINY) for logits in (policy, reference))

    def coefficients(members):
        rows, groups = members.flatten(), {} if baseline is None else {"group_size": members.size(1)}
        terms = kl_terms(spec, logp=logp[rows], ref_logp=ref_logp[rows], mask=TINY.mask[rows], **groups)
        return terms.score_coefficient.view(*members.shape, -1)

    return coefficients


def credited(u, credit):
    if credit == "sequence":
        return u.sum(-1, keepdim=True).expand_as(u)
    return u.flip(-1).cumsum(-1).flip(-1)


def mean_of_those_still_there(credit, policy, reference):
    """The slip: the mean over the members that have a token at the position, the own one among them."""
    c = credited(log_ratio(policy, reference), credit)

    def coefficients(members):
        mask, own = TINY.mask[members], c[members]
        mean = (own * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return (own - mean) * mask

    return coefficients


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("credit", ["to_go", "sequence"])
def test_grpos_whole_gradient_is_that_of_reward_minus_beta_kl(credit, group_size):
    """GRPO's advantages R - mean(R) and the KL together: (1 - 1/G) grad (E[R] - beta KL), with the beta written."""
    policy, reference, rewards = tiny()

    def whole(kl):
        def coefficients(members):
            advantage = rewards[members] - rewards[members].mean(1, keepdim=True)
            return advantage[..., None] * TINY.mask[members] - BETA * kl(members)

        return gradient_of_surrogate(coefficients, policy, group_size)

    wanted = (1 - 1 / group_size) * gradient_of_objective(policy, reference, rewards)
    kl = {of: kl_coefficients(of, credit, policy, reference) for of in ("group_mean", "leave_one_out", None)}
    assert relative_error(whole(kl["group_mean"]), wanted) <= RTOL
    for wrong in (kl["leave_one_out"], kl[None], mean_of_those_still_there(credit, policy, reference)):
        assert relative_error(whole(wrong), wanted) > 1e-2


@pytest.mark.parametrize("group_size", [2, 3])
def test_rloos_whole_gradient_is_that_of_reward_minus_beta_kl(group_size):
    """The same with the mean of the others on both sides, where nothing is shrunk."""
    policy, reference, rewards = tiny()

    def whole(baseline):
        kl = kl_coefficients(baseline, "sequence", policy, reference)

        def coefficients(members):
            own = rewards[members]
            advantage = own - (own.sum(1, keepdim=True) - own) / (group_size - 1)
            return advantage[..., None] * TINY.mask[members] - BETA * kl(members)

        return gradient_of_surrogate(coefficients, policy, group_size)

    wanted = gradient_of_objective(policy, reference, rewards)
    assert relative_error(whole("leave_one_out"), wanted) <= RTOL
    assert relative_error(whole("group_mean"), wanted) > 1e-2


@pytest.mark.parametrize("group_size", [2, 4])
def test_with_sequence_credit_it_is_the_kl_put_into_the_reward(group_size):
    """(R - beta U) - mean(R - beta U) of the group, row by row and not only in the mean."""
    generator = torch.Generator().manual_seed(0)
    logp, ref_logp = -torch.rand(2, 8, 5, dtype=torch.float64, generator=generator)
    mask = torch.arange(5) < torch.randint(1, 6, (8, 1), generator=generator)
    total = ((logp - ref_logp) * mask).sum(-1).view(-1, group_size)
    centred = (total - total.mean(1, keepdim=True)).view(-1, 1) * mask
    inputs = {"logp": logp, "ref_logp": ref_logp, "mask": mask, "group_size": group_size}
    for baseline, same in (("group_mean", True), ("leave_one_out", False)):
        spec = KLSpec.from_name("k1_in_reward", credit="sequence", baseline=baseline)
        found = kl_terms(spec, **inputs)
        assert (relative_error(found.coefficient, centred) <= RTOL) == same
        assert torch.equal(found.coefficient, found.score_coefficient)


@pytest.mark.parametrize(("name", "credit"), [pair for pair in SPECS if "exact" not in pair[0]])
def test_a_baseline_made_beforehand_is_the_batchs_own(name, credit):
    """For hosts that split groups over micro-batches: the mean of the others, made once, and the groups' size."""
    spec = KLSpec.from_name(name, credit=credit, off_policy="prefix", baseline="group_mean")
    generator = torch.Generator().manual_seed(0)
    logp, ref_logp, behavior_logp = -torch.rand(3, 6, 5, generator=generator)
    mask = torch.rand(6, 5, generator=generator) < 0.7
    inputs = {"logp": logp, "ref_logp": ref_logp, "mask": mask}
    together = kl_terms(spec, **inputs, behavior_logp=behavior_logp, group_size=3)
    baseline = leave_one_out_baseline(spec, **inputs, group_size=3)
    for row in range(6):
        one = slice(row, row + 1)
        alone = {key: x[one] for key, x in inputs.items()} | {"behavior_logp": behavior_logp[one]}
        terms = kl_terms(spec, **alone, baseline=baseline[one], group_size=3)
        torch.testing.assert_close(terms.score_coefficient, together.score_coefficient[one], rtol=1e-5, atol=1e-6)
        other = kl_terms(spec, **alone, baseline=baseline[one], group_size=2)
        assert not torch.allclose(other.score_coefficient, terms.score_coefficient)


@pytest.mark.parametrize("group_size", [None, 0, 1])
def test_a_baseline_made_beforehand_needs_the_size_of_its_groups(group_size):
    spec = KLSpec.from_name("k1_in_reward", baseline="group_mean")
    zeros = torch.zeros(3, 2)
    inputs = {"logp": zeros, "ref_logp": zeros, "mask": torch.ones(3, 2)}
    with pytest.raises(ConfigError, match=f"'group_mean' with group_size={group_size}.*completions per prompt"):
        kl_terms(spec, **inputs, baseline=zeros, group_size=group_size)
    with pytest.raises(ConfigError, match="'group_mean' was asked for without groups: pass group_size"):
        kl_terms(spec, **inputs)
