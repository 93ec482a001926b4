"""Leave-one-out, by enumerating every group: the mean stays, and the variance falls where the policy has moved."""

import pytest
import torch

from kl_plugins import KLSpec, kl_terms, leave_one_out_baseline, oracle
from kl_plugins.oracle import RTOL, expected_gradient, relative_error, second_moment, terms_of

SMALL = oracle.enumerate_sequences(3, 3)
PLAIN = KLSpec.from_name("k1_in_reward")
LEFT_OUT = KLSpec.from_name("k1_in_reward", baseline="leave_one_out")


def moved(shift, seed=0):
    """The policy has come to avoid token 0 (the end) that the reference prefers: a long, KL-rich training run."""
    generator = torch.Generator().manual_seed(seed)
    base = 0.3 * torch.randn(SMALL.prefixes, 3, dtype=torch.float64, generator=generator)
    towards = torch.zeros_like(base)
    towards[:, 0] = shift
    return base - towards, base + towards


def variances(policy, reference, group_size):
    mean, plain = second_moment(PLAIN, SMALL, policy, reference, group_size=group_size)
    left_out_mean, left_out = second_moment(LEFT_OUT, SMALL, policy, reference, group_size=group_size)
    truth = oracle.true_gradient("reverse_kl", SMALL, policy, reference)
    assert relative_error(mean, truth) <= RTOL
    assert relative_error(left_out_mean, truth) <= RTOL
    return float(plain), float(left_out)


@pytest.mark.parametrize("group_size", [2, 3, 4])
@pytest.mark.parametrize("shift", [2.0, 3.0, 4.0])
def test_leave_one_out_lowers_the_variance_far_from_the_reference(shift, group_size):
    plain, left_out = variances(*moved(shift), group_size)
    assert left_out < 0.95 * plain


def test_the_gain_grows_with_the_distance_and_the_group():
    def ratio(shift, group_size):
        plain, left_out = variances(*moved(shift), group_size)
        return left_out / plain

    assert ratio(4.0, 2) < ratio(3.0, 2) < ratio(2.0, 2)
    assert ratio(2.0, 4) < ratio(2.0, 2)


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_leave_one_out_raises_the_variance_near_the_reference(strength, group_size):
    """The other side of it: where the log-ratios average about zero, the baseline is only more noise."""
    policy, reference, _ = oracle.structured_policies(SMALL, seed=0, strength=strength)
    plain, left_out = variances(policy, reference, group_size)
    assert left_out > 1.05 * plain


def test_variance_is_the_one_of_independent_rows():
    """The oracle's own check: without a baseline, rows are independent and the variance falls as 1/n."""
    policy, reference = moved(2.0)
    _, one = second_moment(PLAIN, SMALL, policy, reference, group_size=1)
    for group_size in (2, 3):
        _, several = second_moment(PLAIN, SMALL, policy, reference, group_size=group_size)
        assert abs(float(several) * group_size / float(one) - 1) <= RTOL
    # and E|g|^2 - |E g|^2 for one row, term by term
    total, mean = 0.0, torch.zeros_like(policy)
    for row, probability in enumerate(oracle.sequence_probability(policy, SMALL)):
        theta = policy.clone().requires_grad_()
        terms = terms_of(PLAIN, SMALL, theta, reference, rows=torch.tensor([row]))
        gradient = torch.autograd.grad(terms.loss.sum(), theta)[0]
        total, mean = total + probability * gradient.square().sum(), mean + probability * gradient
    assert abs(float((total - mean.square().sum()) / one) - 1) <= RTOL


BASELINE_SPECS = [
    ("k1_in_reward", "to_go"),
    ("k1_in_reward", "sequence"),
    ("k1_in_reward", "token"),
    ("k2_as_loss", "token"),
    ("k2_as_loss", "sequence"),
    ("k3_as_loss", "token"),
    ("k3_in_reward", "to_go"),
]


@pytest.mark.parametrize("off", [None, "token", "prefix", "sequence"])
@pytest.mark.parametrize(("name", "credit"), BASELINE_SPECS)
def test_leave_one_out_keeps_the_mean(name, credit, off):
    """With every credit and weight; the sequences are ragged, so at late positions a group has fewer members."""
    policy, reference, behavior = oracle.structured_policies(SMALL, seed=1, strength=2.0)
    options = {"credit": credit, "allow_biased": True}
    if off is not None:
        options |= {"off_policy": off, "weight_clip": (0.0, float("inf"))}
    sampler = None if off is None else behavior
    plain = expected_gradient(KLSpec.from_name(name, **options), SMALL, policy, reference, behavior=sampler)
    for group_size in (2, 3):
        left_out = expected_gradient(
            KLSpec.from_name(name, baseline="leave_one_out", **options),
            SMALL,
            policy,
            reference,
            behavior=sampler,
            group_size=group_size,
        )
        assert relative_error(left_out, plain) <= RTOL


def group_gradient(coefficient_of, policy, reference, group_size):
    """Exact mean of (1/n) sum_i sum_t c_it score_it over groups, for coefficients (groups, n, T) of the group."""
    probability = oracle.sequence_probability(policy, SMALL)
    members = torch.cartesian_prod(*[torch.arange(len(probability))] * group_size)
    plain = terms_of(PLAIN, SMALL, policy, reference).coefficient
    coefficient = coefficient_of(plain[members]) * SMALL.mask[members]
    score = torch.nn.functional.one_hot(SMALL.tokens, 3) - policy.softmax(-1)[SMALL.prefix]
    rows = (probability[members].prod(-1)[:, None, None] * coefficient)[..., None] * score[members] / group_size
    return torch.zeros_like(policy).index_put((SMALL.prefix[members],), rows, accumulate=True)


@pytest.mark.parametrize("group_size", [2, 3])
def test_batch_mean_shrinks_the_gradient(group_size):
    """Fact 6, and the twin of the test above: a mean with the row itself in it takes 1/n of the gradient."""
    policy, reference, _ = oracle.structured_policies(SMALL, seed=1, strength=2.0)
    truth = oracle.true_gradient("reverse_kl", SMALL, policy, reference)
    mean = group_gradient(lambda c: c - c.mean(1, keepdim=True), policy, reference, group_size)
    assert relative_error(mean, (1 - 1 / group_size) * truth) <= RTOL
    others = group_gradient(
        lambda c: c - (c.sum(1, keepdim=True) - c) / (group_size - 1), policy, reference, group_size
    )
    assert relative_error(others, truth) <= RTOL
    assert relative_error(mean, truth) > 0.3


def test_group_standardization_rescales_the_gradient():
    """Fact 5 in small: dividing by the group's spread changes the gradient's size and direction."""
    policy, reference, _ = oracle.structured_policies(SMALL, seed=1, strength=2.0)
    truth = oracle.true_gradient("reverse_kl", SMALL, policy, reference)
    scaled = group_gradient(
        lambda c: (c - c.mean(1, keepdim=True)) / (c.std(1, keepdim=True) + 1e-4), policy, reference, 3
    )
    best = (scaled * truth).sum() / truth.square().sum()
    assert relative_error(scaled, best * truth) > 1e-2


def baseline_of(u, mask, group_size, credit):
    """Of log-ratios `u`."""
    spec = KLSpec.from_name("k1_in_reward", credit=credit, baseline="leave_one_out")
    return leave_one_out_baseline(spec, logp=u, ref_logp=torch.zeros_like(u), mask=mask, group_size=group_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("credit", ["token", "to_go", "sequence"])
def test_a_rows_own_values_never_reach_its_own_baseline(credit, dtype):
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(8, 5, dtype=dtype, generator=generator)
    mask = torch.arange(5) < torch.randint(1, 6, (8, 1), generator=generator)
    before = baseline_of(u, mask, 4, credit)
    for row in range(8):
        changed = u.clone()
        changed[row] = torch.tensor([1e30, -7.0, 3e-30, 1.0, 0.1], dtype=dtype)
        after = baseline_of(changed, mask, 4, credit)
        assert torch.equal(after[row], before[row])
        same_group = [other for other in range(8) if other // 4 == row // 4 and other != row]
        assert not torch.equal(after[same_group], before[same_group])
        elsewhere = [other for other in range(8) if other // 4 != row // 4]
        assert torch.equal(after[elsewhere], before[elsewhere])


def test_subtracting_the_own_value_from_the_sum_is_noticed():
    """Twin: (sum - own) / (n - 1) is the same number in exact arithmetic, but keeps a trace of the row by rounding."""
    generator = torch.Generator().manual_seed(0)
    coefficient = torch.randn(4, 5, generator=generator)
    changed = coefficient.clone()
    changed[0] *= 1e6

    def by_difference(c):
        return (c.sum(0) - c) / 3

    assert not torch.equal(by_difference(changed)[0], by_difference(coefficient)[0])


def test_only_members_with_something_to_answer_for_are_averaged():
    ragged = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    u = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 99.0], [32.0, 99.0, 99.0]])
    for credit, by_hand in (
        ("token", [[20.0, 16.0, 0.0], [16.5, 2.0, 4.0], [4.5, 9.0, 4.0]]),
        ("to_go", [[28.0, 16.0, 0.0], [19.5, 6.0, 4.0], [15.5, 11.0, 4.0]]),
        ("sequence", [[28.0] * 3, [19.5] * 3, [15.5] * 3]),
    ):
        torch.testing.assert_close(baseline_of(u, ragged, 3, credit), torch.tensor(by_hand), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("credit", "own", "others"), [("to_go", 6.0, 4.0), ("sequence", 7.0, 5.0), ("token", 3.0, 0.0)]
)
def test_a_member_inside_a_tool_call_is_averaged_with_what_it_answers_for(credit, own, others):
    """Row 0's tool answers at position 1; it still answers for position 2, with coefficient 4 (or 5 in all)."""
    spec = KLSpec.from_name("k1_in_reward", credit=credit, baseline="leave_one_out")
    logp, mask = torch.tensor([[1.0, 99.0, 4.0], [1.0, 3.0, 3.0]]), torch.tensor([[1, 0, 1], [1, 1, 1]])
    terms = kl_terms(spec, logp=logp, ref_logp=torch.zeros(2, 3), mask=mask, group_size=2)
    assert terms.coefficient[1, 1] == own - others
    assert terms.coefficient[0, 1] == 0


@pytest.mark.parametrize(("name", "credit"), BASELINE_SPECS)
def test_a_baseline_made_beforehand_is_the_batchs_own(name, credit):
    """For hosts that split groups: made once from whole groups, used row by row."""
    spec = KLSpec.from_name(name, credit=credit, off_policy="prefix", baseline="leave_one_out", allow_biased=True)
    generator = torch.Generator().manual_seed(0)
    logp, ref_logp, behavior_logp = -torch.rand(3, 6, 5, generator=generator)
    mask = torch.rand(6, 5, generator=generator) < 0.7
    inputs = {"logp": logp, "ref_logp": ref_logp, "mask": mask}
    together = kl_terms(spec, **inputs, behavior_logp=behavior_logp, group_size=3)
    baseline = leave_one_out_baseline(spec, **inputs, group_size=3)
    assert not baseline.requires_grad
    for row in range(6):
        one = slice(row, row + 1)
        alone = kl_terms(
            spec,
            **{key: x[one] for key, x in inputs.items()},
            behavior_logp=behavior_logp[one],
            baseline=baseline[one],
        )
        torch.testing.assert_close(alone.score_coefficient, together.score_coefficient[one], rtol=1e-5, atol=1e-6)
