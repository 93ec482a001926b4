"""Off-policy: what each importance weight recovers exactly, what it doesn't, and the slips that look alike."""

import math

import pytest
import torch

from kl_plugins import KLSpec
from kl_plugins.oracle import RTOL, expected_gradient, relative_error, terms_of

UNBOUNDED = (0.0, math.inf)
PREFIX_RECOVERS = [
    ("k1_in_reward", "to_go", 1.0),
    ("k1_in_reward", "to_go", 0.7),
    ("k1_in_reward", "sequence", 1.0),
    ("k1_in_reward", "token", 1.0),
    ("k2_as_loss", "token", 1.0),
    ("k2_as_loss", "sequence", 1.0),
    ("k3_as_loss", "token", 1.0),
    ("k2_in_reward", "to_go", 1.0),
    ("k3_in_reward", "to_go", 1.0),
]
LOCAL = [("k1_in_reward", "local_reverse_kl"), ("k2_as_loss", "local_reverse_kl"), ("k3_as_loss", "local_forward_kl")]


def off_policy(case, name, off, weight_clip=UNBOUNDED, **options):
    clip = {} if off == "none" else {"weight_clip": weight_clip}
    spec = KLSpec.from_name(name, off_policy=off, allow_biased=True, **clip, **options)
    return expected_gradient(
        spec, case.sequences, case.policy, case.reference, behavior=case.behavior, environment=case.environment
    )


def on_policy(case, name, **options):
    spec = KLSpec.from_name(name, allow_biased=True, **options)
    return expected_gradient(spec, case.sequences, case.policy, case.reference, environment=case.environment)


@pytest.mark.parametrize("off", ["prefix", "sequence"])
@pytest.mark.parametrize(("name", "credit", "gamma"), PREFIX_RECOVERS)
def test_prefix_and_sequence_weights_recover_the_on_policy_gradient(name, credit, gamma, off, case):
    options = {"credit": credit} | ({"gamma": gamma} if gamma != 1 else {})
    found = off_policy(case, name, off, **options)
    assert relative_error(found, on_policy(case, name, **options)) <= RTOL


@pytest.mark.parametrize(("name", "credit", "gamma"), PREFIX_RECOVERS)
def test_lesser_weights_do_not(name, credit, gamma, steered):
    """Twin of the test above: without, or with too few ratios the gradient is another one."""
    options = {"credit": credit} | ({"gamma": gamma} if gamma != 1 else {})
    for off in ("none", "token"):
        found = off_policy(steered, name, off, **options)
        assert relative_error(found, on_policy(steered, name, **options)) > 1e-2


@pytest.mark.parametrize("off", ["prefix", "sequence"])
def test_recovered_gradient_is_the_formulas(off, case, exact):
    for name, options, of in (
        ("k1_in_reward", {}, "reverse_kl"),
        ("k2_as_loss", {"credit": "sequence"}, "reverse_kl"),
        ("k2_as_loss", {}, "local_reverse_kl"),
        ("k3_as_loss", {}, "local_forward_kl"),
        ("k1_as_loss", {}, "zero"),
    ):
        assert relative_error(off_policy(case, name, off, **options), exact.closed_form(of, case)) <= RTOL


@pytest.mark.parametrize(("name", "of"), LOCAL)
def test_token_weights_give_the_local_gradient_on_the_behaviors_prefixes(name, of, case, exact):
    found = off_policy(case, name, "token", credit="token")
    assert relative_error(found, exact.closed_form(of, case, prefixes_of=case.behavior)) <= RTOL


@pytest.mark.parametrize(("name", "of"), LOCAL)
def test_local_gradient_on_the_behaviors_prefixes_is_told_apart(name, of, steered, exact):
    """Twin: no weights, or the policy's own prefixes."""
    expected = exact.closed_form(of, steered, prefixes_of=steered.behavior)
    assert relative_error(off_policy(steered, name, "none", credit="token"), expected) > 1e-2
    assert relative_error(exact.closed_form(of, steered), expected) > 1e-2
    assert relative_error(off_policy(steered, name, "prefix", credit="token"), expected) > 1e-2


def test_token_weights_keep_the_expected_score_zero(case, exact):
    assert off_policy(case, "k1_as_loss", "token").norm() <= RTOL
    assert off_policy(case, "k1_as_loss", "none").norm() > 1e-3  # without weights k1 as loss pushes somewhere


def weights(case, kind):
    rho = case.log_rho.exp()
    return {
        "token": rho,
        "prefix": rho.cumprod(-1),
        "sequence": rho.prod(-1, keepdim=True).expand_as(rho),
        "suffix": rho.flip(-1).cumprod(-1).flip(-1),
        "inverse": 1 / rho,
        "previous": torch.cat([torch.ones_like(rho[:, :1]), rho[:, :-1]], dim=-1).cumprod(-1),
    }[kind]


def to_go(x):
    return x.flip(-1).cumsum(-1).flip(-1)


@pytest.mark.parametrize("kind", ["token", "suffix", "inverse", "previous"])
def test_wrong_products_are_noticed(kind, steered, exact):
    """Twin: E_mu[w_t u_t score_t] is the local gradient for prefix products only."""
    expected = exact.closed_form("local_reverse_kl", steered)
    found = exact.by_score(weights(steered, kind) * steered.log_ratio, steered, sampler=steered.behavior)
    assert relative_error(found, expected) > 1e-2
    right = exact.by_score(weights(steered, "prefix") * steered.log_ratio, steered, sampler=steered.behavior)
    assert relative_error(right, expected) <= RTOL


def test_prefix_weight_on_the_whole_to_go_sum_is_wrong(steered, exact):
    """w_t * sum_{s>=t} u_s leaves the later log-ratios under the behavior's distribution."""
    expected = exact.closed_form("reverse_kl", steered)
    u, prefix = steered.log_ratio, weights(steered, "prefix")
    assert relative_error(exact.by_score(prefix * to_go(u), steered, sampler=steered.behavior), expected) > 1e-2
    assert relative_error(exact.by_score(to_go(prefix * u), steered, sampler=steered.behavior), expected) <= RTOL


@pytest.mark.parametrize("off", ["token", "prefix", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_bounds_are_applied_to_the_product(off, mode, case, exact):
    low, high = 0.5, 1.5
    plain = weights(case, off)
    bounded = plain.clamp(low, high) if mode == "truncate" else plain * ((plain >= low) & (plain <= high))
    found = off_policy(case, "k2_as_loss", off, weight_clip=(low, high), weight_clip_mode=mode)
    expected = exact.by_score(bounded * case.log_ratio, case, sampler=case.behavior)
    assert relative_error(found, expected) <= RTOL
    unbounded = exact.by_score(plain * case.log_ratio, case, sampler=case.behavior)
    assert relative_error(found, unbounded) > 1e-3

    spec = KLSpec.from_name("k2_as_loss", off_policy=off, weight_clip=(low, high), weight_clip_mode=mode)
    terms = terms_of(spec, case.sequences, case.policy, case.reference, behavior=case.behavior)
    mask = case.sequences.mask
    assert torch.equal(terms.cut, mask & ((plain < low) | (plain > high)))
    torch.testing.assert_close(terms.weight, bounded * mask, rtol=1e-12, atol=0)


def test_ratio_times_k2_differentiated_is_the_gradient_of_expected_k2(case, exact):
    """Fact 1: only the detached ratio gives the reverse KL; the live one adds rho k2 score."""

    def detached(logp, ref, behavior, mask):
        return (logp - behavior).exp().detach() * (logp - ref) ** 2 / 2

    def live(logp, ref, behavior, mask):
        return (logp - behavior).exp() * (logp - ref) ** 2 / 2

    expected = exact.closed_form("local_reverse_kl", case, prefixes_of=case.behavior)
    ours = off_policy(case, "k2_as_loss", "token")
    assert relative_error(exact.by_autograd(detached, case, sampler=case.behavior), ours) <= RTOL
    wrong = exact.by_autograd(live, case, sampler=case.behavior)
    assert relative_error(wrong, expected) > 1e-2
    theta = case.policy.clone().requires_grad_()  # it is the gradient of sum_s visits_mu(s) E_pi[k2]
    p, u = theta.softmax(-1), theta.log_softmax(-1) - case.reference.log_softmax(-1)
    of_expected_k2 = (exact.visits(case.behavior, case)[:, None] * p * u**2 / 2).sum()
    assert relative_error(wrong, torch.autograd.grad(of_expected_k2, theta)[0]) <= RTOL


def test_ratio_times_k3_differentiated_is_the_local_reverse_kl(case, exact):
    """Fact 2: DeepSeek-V3.2's and TRL's form. A *detached* weight on k3 stays the forward KL."""

    def k3(logp, ref):
        return (ref - logp).exp() - 1 - (ref - logp)

    def live(logp, ref, behavior, mask):
        return (logp - behavior).exp() * k3(logp, ref)

    def detached(logp, ref, behavior, mask):
        return (logp - behavior).exp().detach() * k3(logp, ref)

    reverse = exact.closed_form("local_reverse_kl", case, prefixes_of=case.behavior)
    forward = exact.closed_form("local_forward_kl", case, prefixes_of=case.behavior)
    assert relative_error(exact.by_autograd(live, case, sampler=case.behavior), reverse) <= RTOL
    assert relative_error(exact.by_autograd(detached, case, sampler=case.behavior), forward) <= RTOL
    assert relative_error(off_policy(case, "k3_as_loss", "token"), forward) <= RTOL
    assert relative_error(forward, reverse) > 1e-2


def test_log_ratio_frozen_at_rollout_pulls_towards_the_old_policy(case, exact):
    """Fact 4: reusing mu's log-ratio gives grad KL(pi||ref) - grad KL(pi||mu), even with every weight right."""
    sequence_weight = weights(case, "sequence")
    frozen = exact.by_score(sequence_weight * to_go(case.log_ratio - case.log_rho), case, sampler=case.behavior)
    to_reference = exact.closed_form("reverse_kl", case)
    to_old = exact.closed_form("reverse_kl", case, reference=case.behavior)
    assert relative_error(frozen, to_reference - to_old) <= RTOL
    assert relative_error(frozen, to_reference) > 1e-2
    assert relative_error(off_policy(case, "k1_in_reward", "sequence"), to_reference) <= RTOL


def test_engine_mismatch_that_is_ignored_biases(steered, exact):
    """The sampler is the engine: weights against any other policy leave a bias."""
    shift = 0.3 * torch.sin(torch.arange(steered.behavior.numel())).view_as(steered.behavior)
    spec = KLSpec.from_name("k2_as_loss", weight_clip=UNBOUNDED)

    def weighted_against(assumed):
        terms = terms_of(spec, steered.sequences, steered.policy, steered.reference, behavior=assumed)
        return exact.by_score(terms.score_coefficient, steered, sampler=steered.behavior)

    expected = exact.closed_form("local_reverse_kl", steered, prefixes_of=steered.behavior)
    assert relative_error(weighted_against(steered.behavior), expected) <= RTOL
    assert relative_error(weighted_against(steered.behavior + shift), expected) > 1e-2
