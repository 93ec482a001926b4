"""The KL terms that an audit compares: every configuration of `kl_plugins`, and what installed hosts do themselves.

Each is a function from the log-probs of sampled tokens to what multiplies their scores. A host's own function is
called and differentiated; where it can't be, its formula stands for it, and the row says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kl_plugins.conformance.hosts import HOSTS, Term, installed
from kl_plugins.conformance.subject import Scored
from kl_plugins.core.estimators import k1
from kl_plugins.core.exact import ExactKL
from kl_plugins.core.registry import all_losses
from kl_plugins.core.spec import OFF_POLICY, KLSpec
from kl_plugins.core.terms import kl_terms

Pointwise = Callable[[Tensor, Tensor], Tensor]
"""From the policy's and the reference's log-probs, (B, T), to (B, T) coefficients, elementwise."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a term sees of completions: (B, T) tensors, as in `kl_plugins.kl_terms`, nats."""

    logp: Tensor
    ref_logp: Tensor
    mask: Tensor
    behavior_logp: Tensor | None
    host_behavior_logp: Tensor | None
    kl: Tensor
    """The exact next-token KL(policy || reference), 0 where the token doesn't count."""

    def host_old(self) -> Tensor:
        """The old log-probs that a host's function gets."""
        return self.logp if self.host_behavior_logp is None else self.host_behavior_logp


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """What a term multiplies a token's gradients with, (B, T) each."""

    score: Tensor
    """What multiplies the score grad log pi(y_t)."""
    local: Tensor
    """What multiplies the gradient of the exact next-token KL at the token's prefix."""
    weight: Tensor | None = None
    """The importance weight, where the term has one of its own."""
    cut: Tensor | None = None
    """bool: where the weight was truncated."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One row of the audit."""

    name: str
    """The name of the loss, or of the host and what it is asked for."""
    credit: str = ""
    off_policy: str = ""
    """Empty where there is nothing to choose: on-policy, or a host's own way."""
    origin: str
    """Which function was run, or the formula that stands for one that wasn't."""
    gradient_of: str = ""
    """The divergence that the name promises; empty for hosts, who promise a KL."""
    refused: bool = False
    """Whether kl_plugins refuses it unless `allow_biased` is set."""
    coefficients: Callable[[Tokens], Coefficients]
    pointwise: Pointwise
    """The coefficient of a token by itself, on-policy."""
    later: bool = False
    """Whether a token answers for those after it, too."""
    weighted: bool = False
    """Whether samples of another policy are weighted for the token's ratio."""
    analytic: bool = False
    """Whether the sum over next tokens is taken instead of a sample, so that none is too rare to be drawn."""

    @property
    def label(self) -> str:
        """Name, credit and weights in one line, which no other row shares."""
        return ", ".join(part for part in (f"{self.name} {self.credit}".strip(), self.off_policy) if part)


def own_configurations(*, off_policy: bool) -> list[Configuration]:
    """kl_plugins' configurations with every credit, refused ones too; if `off_policy`, with every kind of weight."""
    kinds = OFF_POLICY if off_policy else ("",)
    found = []
    for name, loss in all_losses().items():
        if loss.exact == "forward_kl":  # the analytic part that is sketched is that of the reverse KL
            continue
        for credit in loss.gradient_of:
            for kind in kinds:
                spec = KLSpec(name=name, credit=credit, off_policy=kind or "none", allow_biased=True)
                found.append(
                    Configuration(
                        name=name,
                        credit=credit,
                        off_policy=kind,
                        origin="kl_plugins.kl_terms",
                        gradient_of=spec.gradient_of,
                        refused=spec.gradient_of in ("zero", "biased"),
                        coefficients=_exact(spec) if loss.exact else _ours(spec),
                        pointwise=_of_log_ratio(k1 if loss.exact else loss.coefficient),  # of the same mean
                        later=credit != "token",
                        weighted=kind != "none",
                        analytic=bool(loss.exact),
                    )
                )
    return found


def host_configurations() -> tuple[list[Configuration], list[str]]:
    """What TRL, OpenRLHF and verl do themselves, by their own functions where they can be run; and what can't be.

    Without terms that are grouped (RLOO's): a row's coefficients must not depend on other rows.
    """
    found, problems = [], []
    for host in HOSTS:
        terms, problem = installed(host)
        found += [of_host(host, term) for term in terms if not term.subject.grouped]
        problems += [problem] if problem else []
    return found, problems


@cache
def _of_log_ratio(coefficient: Callable[[Tensor], Tensor]) -> Pointwise:
    return lambda logp, ref_logp: coefficient(logp - ref_logp)


def _ours(spec: KLSpec) -> Callable[[Tokens], Coefficients]:
    def coefficients(tokens: Tokens) -> Coefficients:
        terms = kl_terms(
            spec,
            logp=tokens.logp,
            ref_logp=tokens.ref_logp,
            mask=tokens.mask,
            behavior_logp=tokens.behavior_logp,
        )
        score = terms.score_coefficient
        return Coefficients(score=score, local=torch.zeros_like(score), weight=terms.weight, cut=terms.cut)

    return coefficients


def _exact(spec: KLSpec) -> Callable[[Tokens], Coefficients]:
    """What `kl_terms` makes of the exact next-token KLs: the weight of each one's gradient, and of the scores."""

    def coefficients(tokens: Tokens) -> Coefficients:
        with torch.enable_grad():
            kl = tokens.kl.detach().clone().requires_grad_()
            terms = kl_terms(
                spec,
                logp=tokens.logp,
                ref_logp=tokens.ref_logp,
                mask=tokens.mask,
                behavior_logp=tokens.behavior_logp,
                exact=ExactKL(value=kl, outside=torch.zeros_like(tokens.mask), of="reverse_kl"),
            )
            (local,) = torch.autograd.grad(terms.loss.sum(), kl)
        return Coefficients(score=terms.score_coefficient, local=local, weight=terms.weight, cut=terms.cut)

    return coefficients


def of_host(host: str, term: Term) -> Configuration:
    """A host's own term as a row of the audit."""
    coefficient = term.subject.coefficient
    assert coefficient is not None

    def coefficients(tokens: Tokens) -> Coefficients:
        # Where logp, ref_logp and old_logp are equal no KL has a gradient.
        logp, ref_logp, old_logp = (
            torch.where(tokens.mask, x, 0.0) for x in (tokens.logp, tokens.ref_logp, tokens.host_old())
        )
        scored = Scored(logp=logp, ref_logp=ref_logp, mask=tokens.mask, old_logp=old_logp)
        score = coefficient(scored) * tokens.mask
        return Coefficients(score=score, local=torch.zeros_like(score))

    def pointwise(logp: Tensor, ref_logp: Tensor) -> Tensor:
        column, ref_column = logp.reshape(-1, 1), ref_logp.reshape(-1, 1)  # each token a sequence of its own
        mask = torch.ones_like(column, dtype=torch.bool)
        scored = Scored(logp=column, ref_logp=ref_column, mask=mask, old_logp=column)
        return coefficient(scored).view_as(logp)

    return Configuration(
        name=f"{host} {term.subject.name}",
        origin=term.subject.origin,
        coefficients=coefficients,
        pointwise=pointwise,
        later=term.where == "reward",
        weighted=bool(term.off_policy),
    )
