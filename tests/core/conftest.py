"""Policies small enough to list every sequence, and gradients written out by hand on them.

Nothing here calls `kl_terms`, and `closed_form` doesn't differentiate anything: the oracle needs an oracle too.
"""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

from kl_plugins import oracle

# name -> seed, strength, scale of the logits, positions drawn by the environment
CASES = {
    "steered": (1, 2.0, 1.0, ()),
    "steered-more": (2, 3.0, 1.0, ()),
    "peaked": (3, 3.0, 3.0, ()),
    "tool": (4, 2.0, 1.0, (1,)),
    "two-tools": (5, 3.0, 1.0, (0, 2)),
}
ONE_OF_EACH_KIND = ("steered", "peaked", "two-tools")
STRUCTURED = ("steered", "steered-more")


@cache
def _sequences(drawn):
    return oracle.enumerate_sequences(3, 4, drawn)


def make_case(name):
    """Logits of a policy, a reference, a behavior policy and the environment, over 3 tokens and 4 positions."""
    seed, strength, scale, drawn = CASES[name]
    sequences = _sequences(drawn)
    policy, reference, behavior = (
        scale * logits for logits in oracle.structured_policies(sequences, seed=seed, strength=strength)
    )
    generator = torch.Generator().manual_seed(100 + seed)
    environment = torch.randn(policy.shape, dtype=torch.float64, generator=generator) if drawn else None
    return SimpleNamespace(
        name=name,
        sequences=sequences,
        policy=policy,
        reference=reference,
        behavior=behavior,
        environment=environment,
        log_ratio=_drawn_logp(policy, sequences) - _drawn_logp(reference, sequences),
        log_rho=_drawn_logp(policy, sequences) - _drawn_logp(behavior, sequences),
    )


def _drawn_logp(logits, sequences):
    """(N, T) log-probability of the tokens that the policy draws, 0 at the others."""
    p = logits.softmax(-1)[sequences.prefix, sequences.tokens]
    return torch.where(sequences.mask, p.log(), 0.0)


def _probability(logits, case):
    """(N, T + 1) probability of arriving at each position of each sequence; the last column is the sequence's."""
    sequences = case.sequences
    step = torch.where(sequences.mask, logits.softmax(-1)[sequences.prefix, sequences.tokens], 1.0)
    if case.environment is not None:
        drawn = case.environment.softmax(-1)[sequences.prefix, sequences.tokens]
        step = step * torch.where(sequences.environment, drawn, 1.0)
    return torch.cat([torch.ones(len(step), 1, dtype=step.dtype), step.cumprod(-1)], dim=1)


def visits(logits, case):
    """(S,) probability that the policy has to draw a token after each prefix, from the prefix's own tokens."""
    found = torch.zeros(case.sequences.prefixes, dtype=torch.float64)
    arrive = _probability(logits, case)[:, :-1]
    found[case.sequences.prefix[case.sequences.mask]] = arrive[case.sequences.mask]
    return found


def by_score(coefficient, case, sampler=None):
    """(S, V): E[sum_t c_t score_t], from the softmax's score: one-hot minus probabilities."""
    sequences = case.sequences
    probability = _probability(case.policy if sampler is None else sampler, case)[:, -1]
    score = (
        torch.nn.functional.one_hot(sequences.tokens, sequences.vocabulary) - case.policy.softmax(-1)[sequences.prefix]
    )
    rows = (probability[:, None] * torch.where(sequences.mask, coefficient, 0.0))[..., None] * score
    return torch.zeros_like(case.policy).index_put((sequences.prefix,), rows, accumulate=True)


def by_autograd(loss, case, sampler=None):
    """(S, V): E[sum_t grad loss_t] of `loss(logp, ref_logp, behavior_logp, mask)`, the sampler held fixed."""
    theta = case.policy.clone().requires_grad_()
    sequences, mask = case.sequences, case.sequences.mask
    logp = theta.log_softmax(-1)[sequences.prefix, sequences.tokens] * mask
    ref_logp, behavior_logp = _drawn_logp(case.reference, sequences), _drawn_logp(case.behavior, sequences)
    probability = _probability(case.policy if sampler is None else sampler, case)[:, -1]
    total = (probability[:, None] * loss(logp, ref_logp, behavior_logp, mask) * mask).sum()
    return torch.autograd.grad(total, theta)[0]


def closed_form(of, case, reference=None, prefixes_of=None):
    """(S, V): the gradient of a divergence with respect to logits, as a formula.

    `reverse_kl` is E[U sum_t score_t] with U the log-ratio of the whole sequence, `forward_kl` the same expectation
    under the reference with -1 for U, and the local ones are p (u - KL) and p - q per visited prefix.
    """
    reference = case.reference if reference is None else reference
    sequences, p, q = case.sequences, case.policy.softmax(-1), reference.softmax(-1)
    if of == "reverse_kl":
        total = (_drawn_logp(case.policy, sequences) - _drawn_logp(reference, sequences)).sum(-1, keepdim=True)
        return by_score(total.expand(sequences.mask.shape), case)
    if of == "forward_kl":
        return by_score(-torch.ones(sequences.mask.shape, dtype=torch.float64), case, sampler=reference)
    weight = visits(case.policy if prefixes_of is None else prefixes_of, case)[:, None]
    if of == "local_reverse_kl":
        u = p.log() - q.log()
        return weight * p * (u - (p * u).sum(-1, keepdim=True))
    if of == "local_forward_kl":
        return weight * (p - q)
    assert of == "zero", of
    return torch.zeros_like(case.policy)


@pytest.fixture(scope="session")
def exact():
    """The functions above, for tests: `exact.closed_form(...)`."""
    return SimpleNamespace(
        make_case=make_case, visits=visits, by_score=by_score, by_autograd=by_autograd, closed_form=closed_form
    )


@pytest.fixture(params=ONE_OF_EACH_KIND)
def case(request):
    """Policies of every kind: steered, peaked, and with environment tokens; all ragged."""
    return make_case(request.param)


@pytest.fixture(params=STRUCTURED)
def steered(request):
    """Policies whose first token steers into prefixes of high KL: they tell estimators apart."""
    return make_case(request.param)
