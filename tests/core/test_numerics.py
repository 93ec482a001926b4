"""float32, bfloat16 and float16: the gradient is float64's, never dead, never NaN, for |log-ratio| 1e-6 to 1e3."""

import math

import pytest
import torch
from numerics import DTYPES, both_signs, differentiate, largest, one_column, spec_of

from kl_plugins import KLSpec

MAGNITUDES = [m * 10.0**e for e in range(-6, 3) for m in (1.0, 2.5, 5.0)] + [20.0, 40.0, 88.0, 89.0, 104.0, 1000.0]
LOG_RATIOS = both_signs(MAGNITUDES)


def k1(u):
    return u


def k2(u):
    return u**2 / 2


def k3(u):
    return torch.expm1(-u) + u


IN_FLOAT64 = {  # coefficient and value before credit
    "k1_in_reward": (k1, k1),
    "k2_as_loss": (k1, k2),
    "k3_as_loss": (lambda u: -torch.expm1(-u), k3),
    "k1_as_loss": (torch.ones_like, k1),
    "k2_in_reward": (k2, k2),
    "k3_in_reward": (k3, k3),
}
SMALL_LIMIT = torch.finfo(torch.float32).tiny
# Every loss, and in half precision, which differs by a cast on the way in and out, those with the widest coefficients.
LOSS_AND_DTYPE = [(name, torch.float32) for name in IN_FLOAT64]
LOSS_AND_DTYPE += [(name, dtype) for dtype in DTYPES[1:] for name in ("k2_as_loss", "k3_as_loss", "k2_in_reward")]


@pytest.mark.parametrize(("name", "dtype"), LOSS_AND_DTYPE)
def test_coefficient_agrees_with_float64(name, dtype):
    logp, ref_logp = one_column(LOG_RATIOS, dtype)
    terms, gradient = differentiate(spec_of(name), logp, ref_logp)
    exact = IN_FLOAT64[name][0](logp.double() - ref_logp.double())
    fits = exact.abs() < largest(dtype)  # the gradient ends in that dtype
    assert fits.sum() > 50  # of 66
    torch.testing.assert_close(terms.score_coefficient.double()[fits], exact[fits], rtol=1e-5, atol=0)
    if dtype is torch.float32:
        assert torch.equal(gradient, terms.score_coefficient)


@pytest.mark.parametrize(("name", "dtype"), LOSS_AND_DTYPE)
def test_gradient_agrees_with_float64_to_the_inputs_rounding(name, dtype):
    """Autograd hands a half-precision leaf its gradient rounded once to that precision."""
    logp, ref_logp = one_column(LOG_RATIOS, dtype)
    _, gradient = differentiate(spec_of(name), logp, ref_logp)
    exact = IN_FLOAT64[name][0](logp.double() - ref_logp.double())
    fits = (exact.abs() < largest(dtype) / 2) & (exact.abs() > torch.finfo(dtype).tiny)
    rtol = 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps
    assert fits.sum() > 25
    torch.testing.assert_close(gradient.double()[fits], exact[fits], rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["k2_as_loss", "k3_as_loss"])
def test_value_is_the_unweighted_estimate(name, dtype):
    """For logging, so k3 may cancel to the rounding of its terms; no weight, credit, bound or baseline is in it."""
    logp, ref_logp = one_column(LOG_RATIOS, dtype)
    terms, _ = differentiate(spec_of(name), logp, ref_logp, behavior_logp=logp - 0.7)
    u = logp.double() - ref_logp.double()
    exact = IN_FLOAT64[name][1](u)
    fits = exact.abs() < largest(torch.bfloat16)
    error = (terms.value.double() - exact).abs()[fits]
    cancelled = 2e-7 * u.abs() if IN_FLOAT64[name][1] is k3 else 0 * u
    assert (error <= (1e-5 * exact.abs() + cancelled)[fits]).all()


@pytest.mark.parametrize("credit", ["token", "to_go", "sequence"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_agree_with_float64(dtype, credit):
    """A thousand tokens around log-probs of -30: relative to what was summed."""
    generator = torch.Generator().manual_seed(0)
    logp = (-30 * torch.rand(4, 1000, generator=generator)).to(dtype)
    ref_logp = (logp.float() + torch.randn(4, 1000, generator=generator)).to(dtype)
    behavior_logp = (logp.float() + 0.1 * torch.randn(4, 1000, generator=generator)).to(dtype)
    spec = KLSpec.from_name("k1_in_reward", credit=credit)
    terms, _ = differentiate(spec, logp, ref_logp, behavior_logp=behavior_logp)
    u, rho = logp.double() - ref_logp.double(), (logp.double() - behavior_logp.double()).exp()
    summed = {"token": u, "to_go": u.flip(-1).cumsum(-1).flip(-1), "sequence": u.sum(-1, keepdim=True).expand_as(u)}
    sizes = {
        "token": u.abs(),
        "to_go": u.abs().flip(-1).cumsum(-1).flip(-1),
        "sequence": u.abs().sum(-1, keepdim=True),
    }
    error = (terms.score_coefficient.double() - rho.clamp(0, 10) * summed[credit]).abs()
    assert (error <= 1e-5 * rho * sizes[credit]).all()
    assert not (error <= 1e-9 * rho * sizes[credit]).all()  # and it was float32 that was measured


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("credit", ["to_go", "sequence"])
def test_terms_of_long_sequences_are_not_cut(dtype, credit):
    """A bound that keeps a sum from overflowing must not clamp the log-ratios that are summed (fact 8)."""
    logp = torch.zeros(1, 8192, dtype=dtype)
    logp[0, 0] = -20.0
    terms, _ = differentiate(KLSpec.from_name("k1_in_reward", credit=credit), logp, torch.zeros_like(logp))
    assert terms.score_coefficient[0, 0] == -20.0


def test_log_ratio_of_half_precision_is_taken_in_float32():
    """The difference of two bfloat16 numbers isn't rounded to bfloat16 again."""
    logp, ref_logp = torch.tensor([[-40.25]]).bfloat16(), torch.tensor([[-0.0078125]]).bfloat16()
    terms, _ = differentiate(spec_of("k2_as_loss"), logp, ref_logp)
    assert terms.score_coefficient.item() == -40.2421875
    assert (logp - ref_logp).item() != -40.2421875


@pytest.mark.parametrize(("name", "dtype"), LOSS_AND_DTYPE)
def test_no_dead_zone(name, dtype):
    size = torch.logspace(-6, 3, 3000)
    logp = torch.cat([size, -size])[:, None].to(dtype)
    assert (logp != 0).all()
    terms, gradient = differentiate(spec_of(name), logp, torch.zeros_like(logp))
    assert (terms.score_coefficient != 0).all()
    if dtype is not torch.float16 or not name.endswith("_in_reward"):  # k2 and k3 in reward square 1e-6
        assert (gradient != 0).all()


def host_k3(d):
    return d.exp() - d - 1


WRONG_K3 = {
    "exp(d) - d - 1": host_k3,
    "d clamped at 20": lambda d: host_k3(d.clamp(-20, 20)),
    "value clamped at 10": lambda d: host_k3(d).clamp(-10, 10),
    "expm1(d) - d": lambda d: d.expm1() - d,
}


@pytest.mark.parametrize("wrong", WRONG_K3)
def test_k3_differentiated_in_float32_is_noticed(wrong):
    """Twin (facts 8 and 9): none of the usual ways of writing k3 passes the tests above."""
    logp = torch.tensor(LOG_RATIOS)[:, None].requires_grad_()
    gradient = torch.autograd.grad(WRONG_K3[wrong](-logp).sum(), logp)[0].double()
    exact = IN_FLOAT64["k3_as_loss"][0](logp.detach().double())
    fits = (exact.abs() < largest(torch.float32)) & (exact.abs() >= SMALL_LIMIT)
    if wrong == "expm1(d) - d":  # right where it is finite, but its backward pass overflows
        assert not gradient.isfinite().all()
    else:
        relative = ((gradient - exact).abs() / exact.abs())[fits]
        assert relative.max() > 1e-3
    if "clamped" in wrong:
        assert (gradient == 0)[(exact.abs() > 1)].any()


@pytest.mark.parametrize(("d", "found"), [(20.0, -32.0), (40.0, 0.0), (89.0, math.nan)])
def test_differentiated_ratio_times_k3_goes_wrong_in_float32(d, found):
    """Fact 9: the host's form, whose gradient is -d on paper. Ours for that gradient is k2's, and exact."""
    logp = torch.tensor([[-d]]).requires_grad_()
    loss = (logp - logp.detach()).exp() * host_k3(-logp)
    gradient = torch.autograd.grad(loss.sum(), logp)[0]
    torch.testing.assert_close(gradient, torch.tensor([[found]]), rtol=0, atol=0, equal_nan=True)
    _, ours = differentiate(spec_of("k2_as_loss"), logp.detach(), torch.zeros(1, 1))
    assert ours.item() == -d


@pytest.mark.parametrize("off", ["token", "prefix"])
def test_no_importance_weight_is_rounded_away(off):
    """float32's exp, not bfloat16's: the ratio of nearly equal policies stays off 1."""
    logp = torch.full((1, 2), -3.0)
    behavior_logp = logp - 1e-6
    terms, _ = differentiate(spec_of("k2_as_loss", off_policy=off), logp, logp - 1, behavior_logp=behavior_logp)
    exact = (logp.double() - behavior_logp.double()).exp()
    exact = exact if off == "token" else exact.cumprod(-1)
    torch.testing.assert_close(terms.weight.double(), exact, rtol=1e-7, atol=0)
    assert (terms.weight != 1).all()


def test_autocast_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    inputs = {"logp": -torch.rand(4, 5, generator=generator), "ref_logp": -torch.rand(4, 5, generator=generator)}
    spec = KLSpec.from_name("k1_in_reward", baseline="leave_one_out")
    plain, _ = differentiate(spec, **inputs, group_size=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = differentiate(spec, **inputs, group_size=4)
    torch.testing.assert_close(cast.score_coefficient, plain.score_coefficient, rtol=1e-6, atol=0)
