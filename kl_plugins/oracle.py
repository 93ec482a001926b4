"""Exact gradients by enumeration: what a KL term's expected gradient *is*, in float64, without sampling.

A policy is a table of logits, one row per prefix, over a vocabulary and length small enough to list every sequence.
`expected_gradient` is the probability-weighted gradient of `kl_terms` over that list; `true_gradient` differentiates
the divergence itself. `check_loss` compares the two for what a registered loss declares.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from kl_plugins.core.exact import exact_kl
from kl_plugins.core.registry import get_loss
from kl_plugins.core.spec import KLSpec
from kl_plugins.core.terms import KLTerms, kl_terms
from kl_plugins.errors import ConfigError

RTOL = 1e-10


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Every sequence of up to T tokens over a vocabulary of V: N of them, with S prefixes. Token 0 ends one."""

    tokens: Tensor
    """(N, T) int64; 0 after the end."""
    prefix: Tensor
    """(N, T) int64: which of the S prefixes the token was drawn after, the row of a table of logits."""
    mask: Tensor
    """(N, T) bool: the policy drew this token."""
    environment: Tensor
    """(N, T) bool: the environment drew this token (a tool's answer): masked, yet later prefixes depend on it."""
    prefixes: int
    """S, the number of prefixes."""
    vocabulary: int
    """V, the number of tokens in the vocabulary."""


def enumerate_sequences(vocabulary: int = 3, length: int = 4, environment: Iterable[int] = ()) -> Sequences:
    """All sequences of up to `length` tokens.

    Args:
        vocabulary: V, token 0 included, which ends a sequence.
        length: T.
        environment: Positions from 0 on whose tokens the environment draws (a tool's answer), not the policy.

    Example:
        >>> sequences = enumerate_sequences(vocabulary=2, length=2)
        >>> sequences.tokens.tolist()
        [[0, 0], [1, 0], [1, 1]]
        >>> sequences.mask.int().tolist()
        [[1, 0], [1, 1], [1, 1]]
    """
    rows = []
    for row in product(range(vocabulary), repeat=length):
        end = row.index(0) if 0 in row else length
        if not any(row[end:]):
            rows.append(row)
    tokens = torch.tensor(rows)
    names: dict[tuple[int, ...], int] = {}
    prefix = torch.tensor([[names.setdefault(row[:t], len(names)) for t in range(length)] for row in rows])
    alive = torch.cat([torch.ones(len(rows), 1), (tokens[:, :-1] != 0).cumprod(-1)], dim=1).bool()
    drawn = torch.zeros(length, dtype=torch.bool)
    drawn[list(environment)] = True
    return Sequences(
        tokens=tokens,
        prefix=prefix,
        mask=alive & ~drawn,
        environment=alive & drawn,
        prefixes=len(names),
        vocabulary=vocabulary,
    )


def structured_policies(sequences: Sequences, *, seed: int, strength: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """(S, V) logits of a policy, of a reference and of a behavior policy that samples, all three float64.

    The first token steers: after token 1 policy and reference nearly agree, after token 2 they disagree by about
    `strength`. On such policies the local and the sequence gradient differ, which random tables hardly show.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(sequences.prefixes, sequences.vocabulary, dtype=torch.float64, generator=generator)

    reference = noise(0.5)
    steered = torch.full((sequences.prefixes, 1), 0.1, dtype=torch.float64)
    steered[sequences.prefix[sequences.tokens[:, 0] == 2][:, 1:].unique()] = strength
    policy = reference + steered * noise(1.0)
    behavior = policy + noise(0.4)
    return policy, reference, behavior


def token_logp(logits: Tensor, sequences: Sequences) -> Tensor:
    """(N, T) log-probability, in nats, of each token after its prefix under (S, V) `logits`."""
    return logits.log_softmax(-1)[sequences.prefix, sequences.tokens]


def sequence_probability(logits: Tensor, sequences: Sequences, environment: Tensor | None = None) -> Tensor:
    """(N,) probability of each sequence when the policy draws its tokens and the environment the others.

    `logits` and `environment` are (S, V). Raises `ValueError` for sequences with environment tokens but no
    `environment`.
    """
    logp = token_logp(logits, sequences) * sequences.mask
    if environment is not None:
        logp = logp + token_logp(environment, sequences) * sequences.environment
    elif sequences.environment.any():
        raise ValueError("the sequences have environment tokens: pass the environment's logits")
    return logp.sum(-1).exp()


def true_gradient(
    of: str,
    sequences: Sequences,
    policy: Tensor,
    reference: Tensor,
    *,
    environment: Tensor | None = None,
    prefixes_of: Tensor | None = None,
) -> Tensor:
    """(S, V) gradient of a divergence with respect to the policy's logits, by differentiating the divergence.

    Args:
        of: `"reverse_kl"`, `"forward_kl"` (of whole sequences), `"local_reverse_kl"`, `"local_forward_kl"` (the sum
            of next-token divergences with the distribution of prefixes held fixed) or `"zero"`.
        sequences: Those of `enumerate_sequences`.
        policy: (S, V) logits, at which the gradient is taken.
        reference: (S, V) logits.
        environment: (S, V) logits of the environment, where it draws tokens.
        prefixes_of: The logits whose prefix distribution a local divergence is taken under; None: the policy's.

    Raises:
        ConfigError: no divergence has that name.
    """
    theta = policy.detach().clone().requires_grad_()
    if of == "zero":
        return torch.zeros_like(policy)
    if of in ("reverse_kl", "forward_kl"):
        gap = ((token_logp(theta, sequences) - token_logp(reference, sequences)) * sequences.mask).sum(-1)
        if of == "reverse_kl":
            divergence = (sequence_probability(theta, sequences, environment) * gap).sum()
        else:
            divergence = -(sequence_probability(reference, sequences, environment) * gap).sum()
    elif of in ("local_reverse_kl", "local_forward_kl"):
        visitor = (policy if prefixes_of is None else prefixes_of).detach()
        visits = prefix_probability(visitor, sequences, environment)
        p, q = theta.log_softmax(-1), reference.log_softmax(-1)
        local = (p.exp() * (p - q)).sum(-1) if of == "local_reverse_kl" else (q.exp() * (q - p)).sum(-1)
        divergence = (visits * local).sum()
    else:
        raise ConfigError(f"no divergence is called {of!r}")
    return torch.autograd.grad(divergence, theta)[0]


def prefix_probability(logits: Tensor, sequences: Sequences, environment: Tensor | None = None) -> Tensor:
    """(S,) probability that the policy has to draw a token after each prefix; 0 where the environment draws.

    `logits` and `environment` are (S, V).
    """
    probability = sequence_probability(logits, sequences, environment)
    visits = torch.zeros(sequences.prefixes, dtype=torch.float64)
    return visits.index_put(
        (sequences.prefix[sequences.mask],), probability[:, None].expand_as(sequences.mask)[sequences.mask], True
    )


def expected_gradient(
    spec: KLSpec,
    sequences: Sequences,
    policy: Tensor,
    reference: Tensor,
    *,
    behavior: Tensor | None = None,
    environment: Tensor | None = None,
    group_size: int = 1,
    **left_out: Tensor,
) -> Tensor:
    """(S, V) exact expected gradient of the summed `kl_terms(...).loss` with respect to the policy's logits.

    Args:
        spec: The configuration.
        sequences: Those of `enumerate_sequences`.
        policy: (S, V) logits, at which the gradient is taken.
        reference: (S, V) logits.
        behavior: (S, V) logits of the policy that samples, whose log-probs are passed as `behavior_logp`; None:
            on-policy.
        environment: (S, V) logits of the environment, where it draws tokens.
        group_size: With more than 1, every *group* of that many sequences is enumerated (N ** group_size of them).
        left_out: `left_out_tokens` and `left_out_positions` of `kl_terms`, each (N, T).

    Raises what `kl_terms` raises.

    Example:
        >>> sequences = enumerate_sequences()
        >>> policy, reference, behavior = structured_policies(sequences, seed=0)
        >>> spec = KLSpec.from_name("k1_in_reward", off_policy="prefix", weight_clip=(0, float("inf")))
        >>> found = expected_gradient(spec, sequences, policy, reference, behavior=behavior)
        >>> relative_error(found, true_gradient("reverse_kl", sequences, policy, reference)) < RTOL
        True
    """
    theta = policy.detach().clone().requires_grad_()
    rows, probability = _groups(sequences, policy if behavior is None else behavior, environment, group_size)
    terms = terms_of(
        spec, sequences, theta, reference, behavior=behavior, rows=rows, group_size=group_size, **left_out
    )
    loss = (probability[:, None] * terms.loss.view(len(probability), -1)).sum() / group_size
    return torch.autograd.grad(loss, theta)[0]


def second_moment(
    spec: KLSpec, sequences: Sequences, policy: Tensor, reference: Tensor, *, group_size: int
) -> tuple[Tensor, Tensor]:
    """Exact on-policy mean (S, V) and total variance () of the group-mean gradient, by enumerating every group.

    `policy` and `reference` are (S, V) logits; `group_size` sequences are drawn independently, N ** group_size groups.
    """
    rows, probability = _groups(sequences, policy, None, group_size)
    visited = sequences.prefix[rows]
    logits = policy.detach()[visited].requires_grad_()  # each position's own copy, so that it has its own gradient
    terms = _terms(spec, sequences, logits, reference[visited], rows=rows, group_size=group_size)
    by_position = torch.autograd.grad(terms.loss.sum(), logits)[0] / group_size
    gradient = torch.zeros(len(probability), *policy.shape, dtype=policy.dtype)
    group = torch.arange(len(rows)) // group_size
    gradient.index_put_((group[:, None].expand_as(visited), visited), by_position, True)
    mean = (probability[:, None, None] * gradient).sum(0)
    return mean, (probability * (gradient - mean).square().sum((1, 2))).sum()


def terms_of(
    spec: KLSpec,
    sequences: Sequences,
    policy: Tensor,
    reference: Tensor,
    *,
    behavior: Tensor | None = None,
    rows: Tensor | None = None,
    group_size: int = 1,
    **left_out: Tensor,
) -> KLTerms:
    """`kl_terms`, (N, T), on the enumerated sequences, given (S, V) logits. Positions that don't count hold NaN.

    `rows` are indices of sequences to take, in groups of `group_size`; None: each sequence once. `left_out` are
    `left_out_tokens` and `left_out_positions` of `kl_terms`.
    """
    rows = torch.arange(len(sequences.tokens)) if rows is None else rows
    visited = sequences.prefix[rows]
    return _terms(
        spec,
        sequences,
        policy[visited],
        reference[visited],
        behavior=None if behavior is None else behavior[visited],
        rows=rows,
        group_size=group_size,
        **left_out,
    )


def _terms(
    spec: KLSpec,
    sequences: Sequences,
    policy: Tensor,
    reference: Tensor,
    *,
    behavior: Tensor | None = None,
    rows: Tensor,
    group_size: int,
    **left_out: Tensor,
) -> KLTerms:
    """`terms_of`, from (N, T, V) logits of each position."""
    mask, tokens = sequences.mask[rows], sequences.tokens[rows]

    def logp_of(logits: Tensor) -> Tensor:
        logp = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        return logp.masked_fill(~mask, torch.nan)

    exact = None
    if spec.loss.exact:
        dirty = [x.masked_fill(~mask[..., None], torch.nan) for x in (policy, reference)]
        exact = exact_kl(spec, logits=dirty[0], ref_logits=dirty[1], mask=mask, tokens=tokens)
    return kl_terms(
        spec,
        logp=logp_of(policy),
        ref_logp=logp_of(reference),
        mask=mask,
        behavior_logp=None if behavior is None else logp_of(behavior),
        group_size=group_size if group_size > 1 else None,
        **{name: where[rows] for name, where in left_out.items()},
        exact=exact,
    )


def _groups(
    sequences: Sequences, sampler: Tensor, environment: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor]:
    """Row indices (N ** group_size * group_size,) of every group in turn, and each group's probability."""
    probability = sequence_probability(sampler.detach(), sequences, environment)
    members = torch.cartesian_prod(*[torch.arange(len(probability))] * group_size).view(-1, group_size)
    return members.flatten(), probability[members].prod(-1)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, or |found| where nothing is expected (Euclidean norms)."""
    scale = expected.norm()
    return float((found - expected).norm() / (scale if scale > 0 else 1))


def check_loss(name: str) -> None:
    """Prove by enumeration that every credit of a registered loss has the on-policy gradient that it declares.

    Raises `ConfigError` with the declared and the found gradient otherwise. A loss that declares `"biased"` must
    differ from every named divergence, and from zero.

    Example:
        >>> check_loss("k2_as_loss")  # says nothing: what it declares is true
    """
    loss = get_loss(name)
    for credit, declared in loss.gradient_of.items():
        spec = KLSpec(name=name, credit=credit, allow_biased=True)
        found = _matches(spec)
        if declared not in found and not (declared == "biased" and not found):
            raise ConfigError(
                f"KL loss {name!r} declares gradient_of={declared!r} for credit={credit!r}, but its exact expected "
                f"gradient is {' or '.join(found) or 'that of none of the named divergences (biased)'}: "
                "correct the declaration or the coefficient"
            )


def _matches(spec: KLSpec) -> list[str]:
    """The named gradients that the exact expected gradient equals, on every structured policy tried."""
    named = ["reverse_kl", "local_reverse_kl", "forward_kl", "local_forward_kl", "zero"]
    sequences = enumerate_sequences()
    for seed, strength in ((0, 1.0), (1, 2.0), (2, 3.0)):
        policy, reference, _ = structured_policies(sequences, seed=seed, strength=strength)
        gradient = expected_gradient(spec, sequences, policy, reference)
        named = [
            of for of in named if relative_error(gradient, true_gradient(of, sequences, policy, reference)) <= RTOL
        ]
    return named
