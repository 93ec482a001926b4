"""Measurements of a KL term on enumerated policies: its expected gradient, its noise, and what masked positions do.

Nothing here is sampled except what says so. The policies are those of `kl_plugins.oracle.structured_policies`: three
tokens, up to four positions, an early token that steers into prefixes where policy and reference disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kl_plugins.conformance.subject import GROUP, Scored, Subject
from kl_plugins.oracle import (
    Sequences,
    enumerate_sequences,
    relative_error,
    sequence_probability,
    structured_policies,
    token_logp,
    true_gradient,
)

SEEDS, STRENGTHS = (0, 1, 2), (1.0, 2.0, 3.0)
SETTINGS = ("on_policy", "stale", "mismatch")
"""Who drew the tokens: the policy; an older one, which the trainer knows; an engine whose probabilities differ from
those of the trainer, who takes them for the policy's own but may be told them."""
DIVERGENCES = ("reverse_kl", "local_reverse_kl", "forward_kl", "local_forward_kl")
LOCAL = ("local_reverse_kl", "local_forward_kl")
NOTHING = 1e-10
"""Relative errors up to this are rounding in float64."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A policy, a reference and an older policy, as tables of logits (S, V)."""

    sequences: Sequences
    policy: Tensor
    reference: Tensor
    behavior: Tensor
    label: str

    def sampler(self, setting: str) -> Tensor:
        """The logits of what draws the tokens; the engine is half as far from the policy as the older one."""
        if setting == "on_policy":
            return self.policy
        return self.behavior if setting == "stale" else (self.policy + self.behavior) / 2

    def scored(self, setting: str, index: Tensor | None = None, group_size: int = 1) -> Scored:
        """The enumerated sequences, or those of `index`, as a KL term gets them."""
        logp, ref_logp, sampled = (
            token_logp(x, self.sequences) for x in (self.policy, self.reference, self.sampler(setting))
        )
        mask, prefix = self.sequences.mask, self.sequences.prefix
        pick = slice(None) if index is None else index
        return Scored(
            # What stands at positions after the end is finite, but means nothing.
            logp=torch.where(mask, logp, -1.0)[pick],
            ref_logp=torch.where(mask, ref_logp, -2.0)[pick],
            mask=mask[pick],
            old_logp=torch.where(mask, sampled if setting == "stale" else logp, -1.0)[pick],
            engine_logp=torch.where(mask, sampled, -1.0)[pick] if setting == "mismatch" else None,
            group_size=group_size,
            tokens=self.sequences.tokens[pick],
            logits=self.policy[prefix][pick],
            ref_logits=self.reference[prefix][pick],
        )

    def true(self, of: str, setting: str = "on_policy") -> Tensor:
        """The gradient of a divergence, a local one on the prefixes that are visited in that setting."""
        visitor = self.sampler(setting)
        return true_gradient(of, self.sequences, self.policy, self.reference, prefixes_of=visitor)


@cache
def cases() -> tuple[Case, ...]:
    """The nine structured policies."""
    sequences = enumerate_sequences(3, 4)
    found = []
    for seed in SEEDS:
        for strength in STRENGTHS:
            policy, reference, behavior = structured_policies(sequences, seed=seed, strength=strength)
            label = f"seed {seed}, strength {strength:g}"
            found.append(Case(sequences=sequences, policy=policy, reference=reference, behavior=behavior, label=label))
    return tuple(found)


def row_gradients(subject: Subject, case: Case, scored: Scored, index: Tensor) -> Tensor:
    """(N, S, V): the gradient of each row with respect to the table of logits."""
    part = subject.logit_gradient(scored)
    prefix = case.sequences.prefix[index]
    found = torch.zeros(len(index), *case.policy.shape, dtype=torch.float64)
    row = torch.arange(len(index))[:, None].expand_as(prefix)
    return found.index_put((row, prefix), part.double(), accumulate=True)


def moments(subject: Subject, case: Case, setting: str) -> tuple[Tensor, float]:
    """Exact mean (S, V) and total variance of a sequence's gradient; if the subject is grouped, of one in a pair."""
    probability = sequence_probability(case.sampler(setting), case.sequences)
    size = 2 if subject.grouped else 1
    index = torch.cartesian_prod(*[torch.arange(len(probability))] * size).reshape(-1)
    found = row_gradients(subject, case, case.scored(setting, index, size), index)
    found = found.view(-1, size, *case.policy.shape).mean(1)
    weight = probability[index].view(-1, size).prod(-1)
    mean = torch.einsum("n,nsv->sv", weight, found)
    return mean, float((weight * (found - mean).square().sum((1, 2))).sum()) * size


@dataclass(frozen=True, kw_only=True)
class Bias:
    """Relative errors of expected gradients, over the nine policies."""

    worst: dict[str, float]
    """Divergence -> the largest of the nine errors."""
    typical: dict[str, float]
    """Divergence -> the geometric mean of the nine errors; 0 where they are nothing but rounding."""
    size: float
    """The largest norm, relative to the reverse KL's gradient."""

    def names(self, tolerance: float) -> list[str]:
        """The divergences whose gradient it is, to `tolerance`; or `"zero"`."""
        if self.size <= tolerance:
            return ["zero"]
        return [name for name, error in self.worst.items() if error <= tolerance]


def identify(found: Tensor, targets: Mapping[str, Tensor], tolerance: float) -> list[str]:
    """For gradients that arrive elsewhere than in logits: the names of those that it equals, to `tolerance`."""
    return [name for name, target in targets.items() if relative_error(found, target) <= tolerance]


def bias(means: Sequence[Tensor], setting: str) -> Bias:
    """How far the expected gradients of the nine policies are from those of the divergences."""
    errors = {of: _errors(means, of, setting) for of in DIVERGENCES}
    for of in LOCAL:  # weights of whole prefixes make a local divergence that of the policy's own prefixes
        own = _errors(means, of, "on_policy")
        errors[of] = own if max(own) < 1e-6 else errors[of]
    size = [float(mean.norm() / true.norm()) for mean, true in _pairs(means, "reverse_kl", setting)]
    return Bias(
        worst={of: max(found) for of, found in errors.items()},
        typical={of: geometric_mean(found) for of, found in errors.items()},
        size=max(size),
    )


def _errors(means: Sequence[Tensor], of: str, setting: str) -> list[float]:
    return [relative_error(mean, true) for mean, true in _pairs(means, of, setting)]


def _pairs(means: Sequence[Tensor], of: str, setting: str) -> Iterator[tuple[Tensor, Tensor]]:
    for case, mean in zip(cases(), means, strict=True):
        yield mean, case.true(of, setting)


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean; 0 if any value is below `NOTHING`, NaN if any is NaN."""
    if any(math.isnan(value) for value in values):
        return math.nan
    return 0.0 if min(values) <= NOTHING else math.exp(sum(map(math.log, values)) / len(values))


def squared_error(
    subject: Subject, case: Case, setting: str, *, samples: int, batches: int = 200, seed: int = 0
) -> tuple[float, float]:
    """E|g - true|^2 / |true|^2 of the mean gradient of `samples` sequences, true that of the sequence reverse KL.

    Exact, with a standard error of 0, unless rows depend on their group: then of `batches` that are drawn.
    """
    true = case.true("reverse_kl")
    scale = float(true.square().sum())
    if not subject.grouped:
        mean, variance = moments(subject, case, setting)
        return (float((mean - true).square().sum()) + variance / samples) / scale, 0.0
    probability = sequence_probability(case.sampler(setting), case.sequences)
    generator = torch.Generator().manual_seed(seed)
    index = torch.multinomial(probability, batches * samples, replacement=True, generator=generator)
    part = subject.logit_gradient(case.scored(setting, index, GROUP)).double() / samples
    batch = torch.arange(batches).repeat_interleave(samples)[:, None].expand(-1, part.size(1))
    found = torch.zeros(batches, *case.policy.shape, dtype=torch.float64)
    found.index_put_((batch, case.sequences.prefix[index]), part, accumulate=True)
    squares = (found - true).square().sum((1, 2)) / scale
    return float(squares.mean()), float(squares.std() / math.sqrt(batches))


@dataclass(frozen=True, kw_only=True)
class Masking:
    """What positions that don't count do to the gradient."""

    finite: bool
    """Other finite numbers there change nothing."""
    nan: bool
    """NaN there changes nothing."""
    inf: bool
    """A log-prob of -inf there, of the reference, changes nothing."""
    ragged: bool
    """Sequences of different lengths have the gradients that each has by itself, without padding."""

    def problems(self) -> list[str]:
        """What is wrong, in words."""
        return self._said(
            finite="numbers at masked positions change the gradient",
            ragged="a padded batch has another gradient than its sequences one by one",
        )

    def remarks(self) -> list[str]:
        """What is wrong only if padding holds what isn't a number."""
        return self._said(
            nan="a NaN at a masked position reaches the gradient",
            inf="a reference log-prob of -inf at a masked position reaches the gradient",
        )

    def _said(self, **texts: str) -> list[str]:
        return [text for name, text in texts.items() if not getattr(self, name)]


def masking(subject: Subject) -> Masking:
    """Compare gradients of a ragged batch with those of the same batch, other things standing at masked positions."""
    case = cases()[4]
    index = torch.arange(len(case.sequences.tokens))
    index = index[: len(index) // GROUP * GROUP]
    size = GROUP if subject.grouped else 1
    scored = case.scored("stale", index, size)
    mask = scored.mask
    base = subject.logit_gradient(scored)
    noise = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def same(found: Tensor) -> bool:
        return bool(torch.allclose(found, base, rtol=1e-6, atol=1e-8))

    def filled(value: Tensor, names: Sequence[str] = ("logp", "ref_logp", "old_logp")) -> bool:
        other: dict[str, Any] = {name: torch.where(mask, getattr(scored, name), value) for name in names}
        return same(subject.logit_gradient(replace(scored, **other)))

    apart = torch.zeros_like(base)
    if not subject.grouped:
        for row, length in enumerate(mask.sum(-1).tolist()):
            alone = _truncated(scored, row, length)
            apart[row, :length] = subject.logit_gradient(alone)[0]
    return Masking(
        finite=filled(-noise.abs() - 0.3) and filled(noise * 3 - 5, ["ref_logp"]),
        nan=filled(torch.tensor(torch.nan, dtype=torch.float64)),
        inf=filled(torch.tensor(-torch.inf, dtype=torch.float64), ["ref_logp"]),
        ragged=subject.grouped or same(apart),
    )


def _truncated(scored: Scored, row: int, length: int) -> Scored:
    names = ("logp", "ref_logp", "mask", "old_logp", "engine_logp", "tokens", "logits", "ref_logits")
    cut: dict[str, Any] = {n: x[row : row + 1, :length] for n in names if (x := getattr(scored, n)) is not None}
    return replace(scored, **cut)


def expected_gradients(subject: Subject, setting: str) -> list[Tensor]:
    """(S, V) exact expected gradients of the subject on each of the nine policies."""
    return [moments(subject, case, setting)[0] for case in cases()]


def best_scale(means: Sequence[Tensor], of: str, setting: str) -> tuple[float, float]:
    """The factor that brings the gradients closest to those of a divergence, and the error that is left."""
    pairs = list(_pairs(means, of, setting))
    dot, square = (sum(float((a * b).sum()) for a, b in each) for each in (pairs, [(m, m) for m, _ in pairs]))
    scale = dot / square if square > 0 else 0.0
    return scale, max(relative_error(scale * mean, true) for mean, true in pairs)


__all__ = [
    "DIVERGENCES",
    "SETTINGS",
    "Bias",
    "Case",
    "Masking",
    "best_scale",
    "bias",
    "cases",
    "expected_gradients",
    "geometric_mean",
    "identify",
    "masking",
    "moments",
    "squared_error",
]
