"""On-policy: every configuration's exact expected gradient is the declared one, and a wrong one is noticed."""

import pytest
import torch

from kl_plugins import ConfigError, KLLoss, KLSpec, oracle
from kl_plugins.core import estimators, registry
from kl_plugins.oracle import RTOL, expected_gradient, relative_error, true_gradient

EVERY_CREDIT = [(name, credit) for name, loss in registry.LOSSES.items() for credit in loss.gradient_of]
NAMED = [pair for pair in EVERY_CREDIT if registry.LOSSES[pair[0]].gradient_of[pair[1]] != "biased"]
DIVERGENCES = ("reverse_kl", "local_reverse_kl", "forward_kl", "local_forward_kl")


def gradient(case, name, **options):
    spec = KLSpec.from_name(name, allow_biased=True, **options)
    return expected_gradient(spec, case.sequences, case.policy, case.reference, environment=case.environment)


def to_go(x, gamma=1.0):
    """sum_{s>=t} gamma^(s-t) x_s, one term at a time."""
    length = x.size(-1)
    columns = [sum(gamma ** (s - t) * x[:, s] for s in range(t, length)) for t in range(length)]
    return torch.stack(columns, dim=-1)


def whole(x):
    return x.sum(-1, keepdim=True).expand_as(x)


def test_the_oracles_divergences_are_the_formulas(case, exact):
    for of in (*DIVERGENCES, "zero"):
        found = true_gradient(of, case.sequences, case.policy, case.reference, environment=case.environment)
        assert relative_error(found, exact.closed_form(of, case)) <= RTOL
        if "local" in of:
            found = true_gradient(
                of,
                case.sequences,
                case.policy,
                case.reference,
                environment=case.environment,
                prefixes_of=case.behavior,
            )
            assert relative_error(found, exact.closed_form(of, case, prefixes_of=case.behavior)) <= RTOL
    with pytest.raises(ConfigError, match="jensen"):
        true_gradient("jensen", case.sequences, case.policy, case.reference)


def test_the_divergences_differ_from_each_other(steered, exact):
    found = {of: exact.closed_form(of, steered) for of in DIVERGENCES}
    for of in DIVERGENCES:
        for other in DIVERGENCES:
            assert of == other or relative_error(found[of], found[other]) > 0.05


def test_forgotten_prefix_distribution_is_noticed(steered, exact):
    """Twin: a local gradient under the wrong policy's prefixes is another one."""
    right = exact.closed_form("local_reverse_kl", steered)
    wrong = exact.closed_form("local_reverse_kl", steered, prefixes_of=steered.behavior)
    assert relative_error(wrong, right) > 1e-2


@pytest.mark.parametrize(("name", "credit"), NAMED)
def test_gradient_is_the_declared_one(name, credit, case, exact):
    declared = KLSpec.from_name(name, credit=credit, allow_biased=True).gradient_of
    assert relative_error(gradient(case, name, credit=credit), exact.closed_form(declared, case)) <= RTOL


@pytest.mark.parametrize(("name", "credit"), EVERY_CREDIT)
def test_gradient_is_none_of_the_others(name, credit, steered, exact):
    declared = KLSpec.from_name(name, credit=credit, allow_biased=True).gradient_of
    for of in DIVERGENCES:
        if of != declared:
            assert relative_error(gradient(steered, name, credit=credit), exact.closed_form(of, steered)) > 0.05


def test_the_table_of_configurations_is_the_contracts():
    assert {name: dict(loss.gradient_of) for name, loss in registry.LOSSES.items()} == {
        "k1_in_reward": {"to_go": "reverse_kl", "sequence": "reverse_kl", "token": "local_reverse_kl"},
        "k2_as_loss": {"token": "local_reverse_kl", "sequence": "reverse_kl"},
        "k3_as_loss": {"token": "local_forward_kl"},
        "k1_as_loss": {"token": "zero"},
        "k2_in_reward": {"to_go": "biased"},
        "k3_in_reward": {"to_go": "biased"},
        "exact_as_loss": {"token": "local_reverse_kl"},
        "exact_in_reward": {"to_go": "reverse_kl", "token": "local_reverse_kl"},
        "exact_forward_as_loss": {"token": "local_forward_kl"},
    }


# Losses as one would write them, differentiated by autograd: what they equal, and what they must not be taken for.
PLAIN_LOSSES = {
    "k1_as_loss": lambda logp, ref, behavior, mask: logp - ref,
    "k2_as_loss": lambda logp, ref, behavior, mask: (logp - ref) ** 2 / 2,
    "k3_as_loss": lambda logp, ref, behavior, mask: (ref - logp).exp() - 1 - (ref - logp),
}


@pytest.mark.parametrize("name", PLAIN_LOSSES)
def test_as_loss_is_the_plain_loss_differentiated(name, case, exact):
    plain = exact.by_autograd(PLAIN_LOSSES[name], case)
    assert (gradient(case, name) - plain).norm() <= RTOL * max(1, plain.norm())  # k1's is zero


@pytest.mark.parametrize("name", PLAIN_LOSSES)
def test_as_loss_is_not_another_plain_loss(name, steered, exact):
    for other, loss in PLAIN_LOSSES.items():
        assert other == name or (gradient(steered, name) - exact.by_autograd(loss, steered)).norm() > 1e-2


def test_sequence_credit_of_k2_is_half_the_squared_total(case, exact):
    def squared_total(logp, ref, behavior, mask):
        share = mask.double() / mask.sum(-1, keepdim=True).clamp(min=1)  # once per sequence, spread over its tokens
        return share * whole(logp - ref) ** 2 / 2

    plain = exact.by_autograd(squared_total, case)
    assert relative_error(gradient(case, "k2_as_loss", credit="sequence"), plain) <= RTOL


@pytest.mark.parametrize("name", ["k1_in_reward", "k2_as_loss", "k3_as_loss", "exact_in_reward"])
def test_k1_and_k3_estimate_the_local_reverse_kl(name, case, exact):
    """Exactly in the mean; k2 is biased, which is why it must be judged by its gradient."""
    spec = KLSpec.from_name(name, allow_biased=True)
    terms = oracle.terms_of(spec, case.sequences, case.policy, case.reference)
    probability = oracle.sequence_probability(case.policy, case.sequences, case.environment)
    p, q = case.policy.log_softmax(-1), case.reference.log_softmax(-1)
    divergence = (exact.visits(case.policy, case) * (p.exp() * (p - q)).sum(-1)).sum()
    error = abs(float((probability * terms.value.sum(-1)).sum() / divergence) - 1)
    assert error > 1e-3 if name.startswith("k2") else error <= RTOL


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_value_of_a_head_and_its_sampled_tail_is_the_local_forward_kl(top_k, case, exact):
    spec = KLSpec.from_name("exact_forward_as_loss", top_k=top_k)
    terms = oracle.terms_of(spec, case.sequences, case.policy, case.reference)
    probability = oracle.sequence_probability(case.policy, case.sequences, case.environment)
    p, q = case.policy.log_softmax(-1), case.reference.log_softmax(-1)
    divergence = (exact.visits(case.policy, case) * (q.exp() * (q - p)).sum(-1)).sum()
    assert abs(float((probability * terms.value.sum(-1)).sum() / divergence) - 1) <= RTOL


WRONG_COEFFICIENTS = {
    "of the future only": lambda u: to_go(u) - u,
    "of the past": lambda u: to_go(u.flip(-1)).flip(-1),
    "own only": lambda u: u,
    "sign flipped": lambda u: -to_go(u),
    "mean instead of sum": lambda u: to_go(u) / u.size(-1),
    "k2 instead of k1": lambda u: to_go(u**2 / 2),
    "k3 instead of k1": lambda u: to_go((-u).expm1() + u),
    "total plus own": lambda u: whole(u) + u,
    "nearly discounted": lambda u: to_go(u, 0.99),
    "clamped": lambda u: to_go(u.clamp(-1, 1)),
}


@pytest.mark.parametrize("wrong", WRONG_COEFFICIENTS)
def test_wrong_coefficients_are_noticed(wrong, steered, exact):
    """Twin of every reverse-KL test above."""
    found = exact.by_score(WRONG_COEFFICIENTS[wrong](steered.log_ratio), steered)
    assert relative_error(found, exact.closed_form("reverse_kl", steered)) > 1e-3
    assert relative_error(exact.by_score(to_go(steered.log_ratio), steered), gradient(steered, "k1_in_reward")) <= RTOL


def test_local_and_sequence_gradient_differ(steered):
    local, full = gradient(steered, "k2_as_loss"), gradient(steered, "k2_as_loss", credit="sequence")
    assert relative_error(local, full) > 0.05


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.99])
def test_discount_is_written_out(gamma, case, exact):
    found = gradient(case, "k1_in_reward", gamma=gamma)
    assert relative_error(found, exact.by_score(to_go(case.log_ratio, gamma), case)) <= RTOL
    if gamma == 0:
        assert relative_error(found, gradient(case, "k1_in_reward", credit="token")) <= RTOL


@pytest.mark.parametrize("gamma", [0.3, 0.99])
def test_discounted_gradient_is_neither_local_nor_full(gamma, steered, exact):
    found = gradient(steered, "k1_in_reward", gamma=gamma)
    for of in ("local_reverse_kl", "reverse_kl"):
        assert relative_error(found, exact.closed_form(of, steered)) > 1e-3
    per_position = to_go(steered.log_ratio) * gamma ** torch.arange(4)  # the position's discount, a common slip
    assert relative_error(found, exact.by_score(per_position, steered)) > 1e-3


def test_discount_counts_positions_across_masked_ones(exact):
    """A tool's answer between two tokens discounts too: gamma is per position, as `KLSpec.gamma` says."""
    case = exact.make_case("tool")
    mask, u = case.sequences.mask, case.log_ratio
    among_counted = torch.zeros_like(u)
    for row in range(len(u)):
        columns = mask[row].nonzero().flatten().tolist()
        for i, t in enumerate(columns):
            among_counted[row, t] = sum(0.5 ** (j - i) * u[row, s] for j, s in enumerate(columns) if j >= i)
    found = gradient(case, "k1_in_reward", gamma=0.5)
    assert relative_error(found, exact.by_score(to_go(u, 0.5), case)) <= RTOL
    assert relative_error(found, exact.by_score(among_counted, case)) > 1e-3


def grad_of_expected(pointwise, case, exact):
    """grad E_pi[sum_t f(u_t)], the sampling distribution and f differentiated both."""
    theta = case.policy.clone().requires_grad_()
    probability = oracle.sequence_probability(theta, case.sequences, case.environment)
    u = (oracle.token_logp(theta, case.sequences) - oracle.token_logp(case.reference, case.sequences)).masked_fill(
        ~case.sequences.mask, 0
    )
    return torch.autograd.grad((probability * pointwise(u).sum(-1)).sum(), theta)[0]


def test_k2_in_reward_has_the_gradient_it_names(case, exact):
    expected = grad_of_expected(estimators.k2, case, exact) - exact.closed_form("local_reverse_kl", case)
    assert relative_error(gradient(case, "k2_in_reward"), expected) <= RTOL
    without = grad_of_expected(estimators.k2, case, exact)
    assert relative_error(gradient(case, "k2_in_reward"), without) > 1e-3


def test_k3_in_reward_has_the_gradient_it_names(case, exact):
    expected = exact.closed_form("reverse_kl", case) - exact.closed_form("local_forward_kl", case)
    assert relative_error(gradient(case, "k3_in_reward"), expected) <= RTOL
    if case.environment is None:
        with_sequence = exact.closed_form("reverse_kl", case) - exact.closed_form("forward_kl", case)
        assert relative_error(gradient(case, "k3_in_reward"), with_sequence) > 1e-3


def test_k3_in_reward_can_point_away_from_the_reference(exact):
    """Of a uniform reference the policy has come to prefer one token; descending k3 in reward strengthens that."""
    case = exact.make_case("steered")
    case.reference = torch.zeros_like(case.policy)
    case.policy = torch.zeros_like(case.policy)
    case.policy[:, 2] = 3.0
    right, found = exact.closed_form("reverse_kl", case), gradient(case, "k3_in_reward")
    assert (found * right).sum() < -0.5 * right.square().sum()

    def divergence(logits):
        gap = (
            oracle.token_logp(logits, case.sequences) - oracle.token_logp(case.reference, case.sequences)
        ).masked_fill(~case.sequences.mask, 0)
        return (oracle.sequence_probability(logits, case.sequences) * gap.sum(-1)).sum()

    before = divergence(case.policy)
    assert divergence(case.policy - 0.01 * found) > before
    assert divergence(case.policy - 0.01 * gradient(case, "k1_in_reward")) < before


@pytest.mark.parametrize("name", registry.LOSSES)
def test_check_loss_accepts_every_entry(name):
    oracle.check_loss(name)


def declaring(coefficient, credit, gradient_of):
    return KLLoss(
        name="temporary",
        summary="For one test.",
        value=estimators.k1,
        coefficient=coefficient,
        gradient_of={credit: gradient_of},
        default_credit=credit,
    )


@pytest.fixture
def temporary(monkeypatch):
    monkeypatch.setattr(registry, "LOSSES", dict(registry.LOSSES))
    return lambda *args: registry.register(declaring(*args))


TRUE_DECLARATIONS = [
    (lambda u: u + 5, "token", "local_reverse_kl"),  # a constant adds a multiple of the expected score: nothing
    (lambda u: -torch.exp(-u), "token", "local_forward_kl"),
    (lambda u: u, "to_go", "reverse_kl"),
    (lambda u: u * 0 + 3, "token", "zero"),
    (lambda u: 2 * u, "token", "biased"),
]
FALSE_DECLARATIONS = [
    (lambda u: u, "token", "reverse_kl"),
    (lambda u: u, "to_go", "local_reverse_kl"),
    (lambda u: 2 * u, "token", "local_reverse_kl"),
    (lambda u: -u, "token", "local_reverse_kl"),
    (lambda u: u * (1 + 1e-8), "token", "local_reverse_kl"),
    (lambda u: u.clamp(-5, 5), "token", "local_reverse_kl"),
    (lambda u: -(-u).expm1(), "token", "local_reverse_kl"),
    (lambda u: -(-u).expm1(), "token", "forward_kl"),
    (lambda u: -(-u).expm1(), "to_go", "forward_kl"),
    (lambda u: (-u).expm1() + u, "to_go", "reverse_kl"),
    (lambda u: u, "token", "zero"),
    (lambda u: u * 0 + 3, "to_go", "zero"),  # pays for the length, which the tokens decide
    (lambda u: u, "token", "biased"),
    (lambda u: u * 0, "token", "biased"),
]


@pytest.mark.parametrize("declaration", TRUE_DECLARATIONS)
def test_check_loss_accepts_a_true_declaration(declaration, temporary):
    temporary(*declaration)
    oracle.check_loss("temporary")


@pytest.mark.parametrize("declaration", FALSE_DECLARATIONS)
def test_check_loss_refuses_a_false_declaration(declaration, temporary):
    temporary(*declaration)
    with pytest.raises(ConfigError, match=rf"'temporary' declares gradient_of='{declaration[2]}'.*exact expected"):
        oracle.check_loss("temporary")
