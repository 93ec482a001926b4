"""Overflow: whatever the log-probs, outputs and gradients stay finite, non-zero and inside the bounds asked for."""

import math

import pytest
import torch
from numerics import DTYPES, SAMPLED, both_signs, differentiate, largest, one_column, spec_of

from kl_plugins import ConfigError, KLLoss, KLSpec, kl_terms
from kl_plugins.core import estimators, registry

MAGNITUDES = [1e-6, 1e-3, 0.1, 1.0, 5.0, 9.0, 11.0, 12.0, 20.0, 88.0, 89.0, 104.0, 500.0, 1000.0]
LOG_RATIOS = both_signs(MAGNITUDES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SAMPLED)
def test_outputs_are_finite(name, dtype):
    logp, ref_logp = one_column(LOG_RATIOS, dtype)
    terms, _ = differentiate(spec_of(name), logp, ref_logp)
    assert terms.score_coefficient.isfinite().all()
    assert terms.value.isfinite().all()
    assert terms.loss.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["k3_as_loss", "k3_in_reward"])
def test_gradient_is_finite_where_k3_overflows(name, dtype):
    """With respect to `logp` itself, in its own dtype: what the model's backward pass receives."""
    logp, ref_logp = one_column(LOG_RATIOS, dtype)
    _, gradient = differentiate(spec_of(name), logp, ref_logp)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("u", [-89.0, -104.0, -1000.0])
def test_k3_is_bounded_with_the_right_sign_where_it_overflows(u):
    logp, ref_logp = torch.tensor([[u]]), torch.zeros(1, 1)
    for name, sign in (("k3_as_loss", -1), ("k3_in_reward", 1)):
        terms, gradient = differentiate(spec_of(name), logp, ref_logp)
        assert gradient.item() == sign * largest(torch.float32)
        assert terms.value.item() == largest(torch.float32)
        bounded, gradient = differentiate(spec_of(name, coefficient_bound=50.0), logp, ref_logp)
        assert gradient.item() == sign * 50.0
        assert bounded.value.item() == largest(torch.float32)  # the bound is on the coefficient only


def test_coefficient_bound_leaves_smaller_coefficients_alone():
    logp, ref_logp = one_column(LOG_RATIOS, torch.float32)
    free, _ = differentiate(spec_of("k3_as_loss"), logp, ref_logp)
    bounded, _ = differentiate(spec_of("k3_as_loss", coefficient_bound=7.0), logp, ref_logp)
    inside = free.coefficient.abs() <= 7
    assert 10 < inside.sum() < len(LOG_RATIOS) - 5
    assert torch.equal(bounded.coefficient[inside], free.coefficient[inside])
    assert torch.equal(bounded.coefficient[~inside], 7 * free.coefficient[~inside].sign())
    with pytest.raises(ConfigError, match="coefficient_bound"):
        spec_of("k2_as_loss", coefficient_bound=7.0)


UNBOUNDED = (0.0, math.inf)
# Every loss where the product overflows, and every weight with every kind of bound.
HUGE = [(name, "prefix", UNBOUNDED, "truncate") for name in SAMPLED]
HUGE += [("k3_as_loss", off, UNBOUNDED, mode) for off in ("token", "sequence") for mode in ("truncate", "mask")]
HUGE += [("k3_as_loss", off, (0.5, 2.0), "mask") for off in ("token", "prefix", "sequence")]
HUGE += [("k3_in_reward", "prefix", (0.5, 2.0), "truncate"), ("k3_in_reward", "prefix", UNBOUNDED, "mask")]


@pytest.mark.parametrize(("name", "off", "bounds", "mode"), HUGE)
def test_huge_ratios_stay_finite_and_inside_the_bounds(name, off, bounds, mode):
    log_rho = torch.tensor(
        [[1e3, -1e3, 5.0], [-1e3, 1e3, -5.0], [1e3, 1e3, 1e3], [-1e3, -1e3, -1e3], [88.0, 1.0, 60.0]]
    )
    for u in (1e3, -1e3, 1e-6):
        logp = torch.zeros(5, 3)
        terms, gradient = differentiate(
            spec_of(name, off_policy=off, weight_clip=bounds, weight_clip_mode=mode),
            logp,
            logp - u,
            behavior_logp=logp - log_rho,
        )
        for output in (terms.loss, terms.value, terms.coefficient, terms.weight, terms.score_coefficient, gradient):
            assert output.isfinite().all()
        low, high = bounds
        assert (terms.weight <= high).all()
        assert ((terms.weight >= low) | ((mode == "mask") & terms.cut)).all()
        assert terms.weight.square().isfinite().all()  # the effective sample size is computed from it


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_weights_at_the_bounds(mode):
    log_rho = torch.tensor([[0.5, 1.0, 1.5, 9.9, 10.1, 0.1]]).log()
    spec = KLSpec.from_name("k2_as_loss", weight_clip=(0.4, 10.0), weight_clip_mode=mode)
    logp = torch.full((1, 6), -1.0)
    terms, _ = differentiate(spec, logp, logp, behavior_logp=logp - log_rho)
    outside = [10.0, 0.4] if mode == "truncate" else [0.0, 0.0]
    torch.testing.assert_close(terms.weight, torch.tensor([[0.5, 1.0, 1.5, 9.9, *outside]]), rtol=1e-6, atol=0)
    assert terms.cut.tolist() == [[False] * 4 + [True] * 2]


@pytest.mark.parametrize("name", ["k3_as_loss", "k3_in_reward"])
def test_without_a_bound_an_overflowing_token_costs_the_step(name):
    """Documented at `coefficient_bound`: the gradient is finite, but its norm isn't, so clipping by it gives 0."""
    logp = torch.tensor([[-100.0, -1.0]]).requires_grad_()
    kl_terms(spec_of(name), logp=logp, ref_logp=torch.zeros(1, 2), mask=torch.ones(1, 2)).loss.sum().backward()
    assert logp.grad.isfinite().all()
    assert logp.grad[0, 0] != 0
    assert logp.grad.norm().isinf()


def test_a_smaller_bound_saves_the_step():
    """What a user can do about it, and the twin of the test above."""
    logp = torch.tensor([[-100.0, -1.0]]).requires_grad_()
    spec = spec_of("k3_as_loss", coefficient_bound=1e4)
    kl_terms(spec, logp=logp, ref_logp=torch.zeros(1, 2), mask=torch.ones(1, 2)).loss.sum().backward()
    assert torch.nn.utils.clip_grad_norm_([logp], 1.0) > 1e4 - 1
    assert abs(logp.grad[0, 0].item() + 1) < 1e-3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("k1_in_reward", {"credit": "to_go"}),
        ("k1_in_reward", {"credit": "sequence", "off_policy": "prefix"}),
        ("k2_as_loss", {"credit": "sequence", "off_policy": "prefix"}),
    ],
)
def test_log_probs_of_logits_masked_with_the_smallest_float_give_no_nan(name, options):
    """Hosts write finfo.min where a token is forbidden: finite, so it isn't caught at entry; its sums are not."""
    low = torch.finfo(torch.float32).min
    logp = torch.tensor([[low, low, -1.0, -1.0]])
    ref_logp = behavior_logp = torch.tensor([[-1.0, -1.0, low, low]])
    terms, gradient = differentiate(spec_of(name, **options), logp, ref_logp, behavior_logp=behavior_logp)
    assert not terms.score_coefficient.isnan().any()
    assert gradient.isfinite().all()


def test_third_partys_overflowing_coefficient_with_sequence_credit_gives_no_nan(monkeypatch):
    loss = KLLoss(
        name="k3_sequence_in_reward",
        summary="For one test.",
        value=estimators.k3,
        coefficient=estimators.k3,
        gradient_of={"sequence": "biased"},
        default_credit="sequence",
    )
    monkeypatch.setitem(registry.LOSSES, loss.name, loss)
    logp, behavior_logp = torch.tensor([[-100.0, -100.0, -100.0, 1.0]]), torch.tensor([[0.0, 0.0, 0.0, 1000.0]])
    spec = spec_of(loss.name, off_policy="prefix")
    terms, _ = differentiate(spec, logp, torch.zeros(1, 4), behavior_logp=behavior_logp)
    assert terms.score_coefficient.isfinite().all()


def test_leave_one_out_of_overflowing_coefficients_gives_no_nan():
    """All at the bound: the mean of the others is the bound too, give or take a rounding."""
    spec = spec_of("k3_as_loss", baseline="leave_one_out")
    for group_size in range(2, 33):
        logp = torch.full((group_size, 1), -1000.0)
        for behavior_logp in (logp, logp + 1000):  # weight 1, weight 0
            terms, gradient = differentiate(
                spec, logp, torch.zeros_like(logp), behavior_logp=behavior_logp, group_size=group_size
            )
            assert terms.coefficient.isfinite().all()
            assert gradient.isfinite().all()
