"""Training towards a known optimum: what is said to be exact is, and what doesn't regularize is seen not to."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from kl_plugins import ConfigError, KLSpec
from kl_plugins.conformance import from_function, from_spec
from kl_plugins.conformance import known_optimum as known

SEQUENCE = KLSpec(name="k1_in_reward", credit="sequence", baseline="leave_one_out")
LIKE_RLOO = {"baseline": "leave_one_out", "steps": 120}


@pytest.fixture(scope="module")
def problem():
    return known.terminal(length=8, beta=0.3, seed=0)


def every_completion(problem, logits):
    """Probability, reward and log-ratio of each completion of a short problem, by listing them all."""
    length, size, _ = logits.shape
    logp = logits.log_softmax(-1)
    for tokens in product(range(size), repeat=length):
        steps = list(zip(range(length), (0, *tokens), tokens, strict=False))
        total = sum(logp[step] for step in steps)
        yield (
            total.exp(),
            sum(problem.reward[step] for step in steps),
            total - sum(problem.reference[step] for step in steps),
        )


@pytest.mark.parametrize("make", known.PROBLEMS.values())
def test_recursions_agree_with_a_list_of_every_completion(make):
    problem = make(length=3, beta=0.4, seed=1)
    generator = torch.Generator().manual_seed(0)
    logits = problem.reference + torch.randn(problem.reference.shape, dtype=torch.float64, generator=generator)
    rows = list(every_completion(problem, logits))
    reward, kl = known.reward_and_kl(logits, problem)
    assert reward == pytest.approx(float(sum(p * r for p, r, _ in rows)), rel=1e-12)
    assert kl == pytest.approx(float(sum(p * u for p, _, u in rows)), rel=1e-12)


@pytest.mark.parametrize("make", known.PROBLEMS.values())
def test_the_optimum_is_worth_what_it_is_said_to_and_tilts_every_completion_alike(make):
    problem = make(length=3, beta=0.4, seed=1)
    policy, value = known.optimum(problem)
    reward, kl = known.reward_and_kl(policy, problem)
    assert reward - problem.beta * kl == pytest.approx(value, rel=1e-12)
    assert known.share(policy, problem) == pytest.approx(1.0, rel=1e-12)
    assert known.share(problem.reference, problem) == pytest.approx(0.0, abs=1e-12)
    left = torch.stack([r - problem.beta * u for _, r, u in every_completion(problem, policy)])
    torch.testing.assert_close(left, torch.full_like(left, value))


def test_twin_a_policy_beside_the_optimum_is_worth_less(problem):
    policy, _ = known.optimum(problem)
    other = known.optimum(known.terminal(length=8, beta=0.6, seed=0))[0]
    assert known.share(policy, problem) - known.share(other, problem) > 0.05


def test_sequence_credit_reaches_the_optimum(problem):
    found = known.train(SEQUENCE, problem, **LIKE_RLOO)
    assert found.share > 0.98
    assert found.reward - problem.beta * found.kl < known.optimum(problem)[1]


def test_twins_what_doesnt_regularize_ends_below_the_reference(problem):
    wrong = KLSpec(name="k1_as_loss", allow_biased=True)
    assert known.train(None, problem, **LIKE_RLOO | {"steps": 250}).share < 0
    assert known.train(wrong, problem, **LIKE_RLOO | {"steps": 250}).share < 0


@pytest.mark.parametrize("regime", [{}, {"iterations": 3}, {"staleness": 3}, {"engine_noise": 0.2}])
def test_an_adapter_of_another_framework_trains_as_the_same_term_of_ours(problem, regime):
    """k2 as loss by autograd and by `kl_terms`; without weights, since the function has none."""

    def k2(logp, ref_logp):
        return (logp - ref_logp).square() / 2

    ours = KLSpec(name="k2_as_loss", off_policy="none")
    found, same = (known.train(term, problem, steps=20, **regime) for term in (from_function(k2), ours))
    assert found.share == pytest.approx(same.share, rel=1e-9)


def test_an_exact_kl_trains_as_its_own_gradient_does(problem):
    """Both ways in: coefficients of sampled tokens, and gradients of whole distributions."""
    spec = KLSpec(name="exact_as_loss")
    found = known.train(spec, problem, steps=60)
    assert found == known.train(from_spec(spec), problem, steps=60)
    assert abs(found.share - known.train(KLSpec(name="k2_as_loss"), problem, steps=60).share) < 0.05


def squared_bias_over_noise(term, baseline, factor=1.0):
    """Of the mean of sampled gradients, against `factor` times that of E[R] - beta KL: about 1 if it is unbiased."""
    problem = known.hackable(length=4, beta=0.3, seed=0, rare=0.1)
    policy = known.optimum(known.hackable(length=4, beta=0.2, seed=0, rare=0.1))[0].requires_grad_()
    reward, kl = known.worth(policy, problem)
    (true,) = torch.autograd.grad(problem.beta * kl - reward, policy)
    found = known.gradients(term, problem, policy.detach(), seeds=range(1000), group_size=4, baseline=baseline)
    return float((found.mean(0) - factor * true).square().sum() / (found.var(0).sum() / len(found)))


@pytest.mark.parametrize(
    "spec",
    [
        SEQUENCE,
        KLSpec(name="k1_in_reward", baseline="leave_one_out"),
        KLSpec(name="exact_in_reward", baseline="leave_one_out"),
    ],
)
def test_the_whole_gradient_is_that_of_the_objective(spec):
    assert squared_bias_over_noise(spec, "leave_one_out") < 2


def test_with_the_groups_mean_reward_and_kl_are_shrunk_alike_and_beta_is_kept():
    spec = KLSpec(name="k1_in_reward", credit="sequence", baseline="group_mean")
    assert squared_bias_over_noise(spec, "group_mean", 0.75) < 2


def test_twins_of_the_whole_gradient():
    """A term with a local gradient, and a KL that isn't shrunk where the reward is, have another one."""
    assert squared_bias_over_noise(KLSpec(name="k2_as_loss"), "leave_one_out") > 4
    assert squared_bias_over_noise(SEQUENCE, "group_mean", 0.75) > 4


def rloo(factor=1.0):
    """RLOO by hand: the KL in the reward, the mean of the group's others subtracted."""

    def advantages(scored, outcome, beta):
        total = outcome - factor * beta * (scored.old_logp - scored.ref_logp).sum(-1)
        groups = total.view(-1, scored.group_size)
        others = (groups.sum(1, keepdim=True) - groups) / (scored.group_size - 1)
        return (groups - others).flatten()[:, None].expand_as(scored.logp)

    return known.InReward(name="RLOO", advantages=advantages)


def test_a_kl_in_the_reward_trains_as_sequence_credit_does(problem):
    """On-policy the two are the same, update by update; so is a KL in the advantage."""
    inside = KLSpec(name="k1_in_reward", credit="sequence", baseline="leave_one_out", clip="combined")
    by_hand = known.train(rloo(), problem, **LIKE_RLOO)
    for spec in (SEQUENCE, inside):
        assert known.train(spec, problem, **LIKE_RLOO).share == pytest.approx(by_hand.share, rel=1e-9)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_twin_a_wrong_beta_is_seen(problem, factor):
    right, wrong = (known.train(rloo(beta), problem, **LIKE_RLOO).share for beta in (1.0, factor))
    assert right > 0.99
    assert wrong < 0.97


def test_scales_divide_the_reward_and_with_it_the_kl(problem):
    """A KL that is divided as the reward is keeps its beta; one that isn't is outweighed."""
    scaled = LIKE_RLOO | {"scale": "group", "steps": 200}
    kept = known.train(SEQUENCE, problem, kl_scale="reward", **scaled).kl
    outweighed = known.train(SEQUENCE, problem, **scaled).kl
    assert kept < 0.8 * outweighed


def test_stale_samples_are_scored_by_the_policy_that_drew_them(problem):
    """Seen by a term that is told: after the first updates the ratio differs from 1, on-policy never."""
    ratios = []

    def see(logp, ref_logp, mask, old_logp):
        ratios.append(float((logp - old_logp).abs().max()))
        return 0 * logp

    watch = from_function(see, kind="coefficient")
    known.train(watch, problem, steps=4)
    assert ratios == [0.0] * 4
    ratios.clear()
    known.train(watch, problem, steps=4, staleness=2)
    assert ratios[0] == 0.0
    assert 0 < ratios[1] < ratios[2]
    ratios.clear()
    known.train(watch, problem, steps=2, iterations=2)
    assert [ratio > 0 for ratio in ratios] == [False, True, False, True]


def test_the_engine_is_told_of(problem):
    gaps = []

    def see(logp, ref_logp, mask, old_logp, engine_logp=None):
        gaps.append(None if engine_logp is None else float((engine_logp - old_logp).std()))
        return 0 * logp

    watch = from_function(see, kind="coefficient")
    known.train(watch, problem, steps=1)
    known.train(watch, problem, steps=1, engine_noise=0.2)
    assert gaps[0] is None
    assert 0.1 < gaps[1] < 0.3


def test_a_seed_makes_a_run(problem):
    first, again, other = (known.train(SEQUENCE, problem, seed=seed, steps=10) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_runs_side_by_side_are_the_runs_one_by_one():
    problems = [known.dense(length=5, beta=0.5, seed=seed) for seed in (3, 4)]
    for term in (SEQUENCE, KLSpec(name="exact_as_loss"), rloo()):
        found = known.train_all(term, problems, seeds=(7, 8), steps=15, engine_noise=0.1, staleness=1)
        for one, problem, seed in zip(found, problems, (7, 8), strict=True):
            alone = known.train(term, problem, seed=seed, steps=15, engine_noise=0.1, staleness=1)
            assert one.share == pytest.approx(alone.share, rel=1e-9)


def test_runs_side_by_side_are_of_one_shape(problem):
    with pytest.raises(ConfigError, match="several shapes or betas"):
        known.train_all(None, [problem, known.terminal(length=4, beta=0.3, seed=0)], seeds=(0, 1))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": 60}, "whole groups"),
        ({"group_size": 1}, "at least two"),
        ({"baseline": "mean"}, "'group_mean', 'leave_one_out'"),
        ({"scale": "std"}, "'none', 'group'"),
        ({"kl_scale": "group"}, "'none', 'reward'"),
    ],
)
def test_what_cant_be_is_refused(problem, options, says):
    with pytest.raises(ConfigError, match=says):
        known.train(None, problem, **options)
