"""The KL terms that an audit compares: every configuration of `kl_plugins`, and what installed hosts do themselves.

Each is a function from the log-probs of sampled tokens to what multiplies their scores. A host's own function is
called and differentiated; where it can't be, its formula stands for it, and the row says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from kl_plugins.audit.objective import Objective
from kl_plugins.conformance.hosts import HOSTS, Term, installed
from kl_plugins.conformance.subject import Scored
from kl_plugins.core.estimators import k1
from kl_plugins.core.exact import ExactKL
from kl_plugins.core.registry import all_losses
from kl_plugins.core.spec import OFF_POLICY, KLSpec
from kl_plugins.core.terms import kl_terms
from kl_plugins.core.weights import ppo_clip

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
    rewards: Tensor | None = None
    """(B,), of the completions."""
    group_size: int | None = None
    """Consecutive rows that are a group of one prompt; None where nothing looks at groups."""

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
    baseline: str = ""
    """What is subtracted that other rows of the group have a part in."""
    origin: str
    """Which function was run, or the formula that stands for one that wasn't."""
    gradient_of: str = ""
    """The divergence that the name promises; empty for hosts, who promise a KL."""
    refused: bool = False
    """Whether kl_plugins refuses it unless `allow_biased` is set."""
    coefficients: Callable[[Tokens], Coefficients]
    pointwise: Pointwise | None = None
    """The coefficient of a token by itself, on-policy. None: rows depend on their group, so that there is no gradient
    of one completion, and the term is only judged as a part of the whole gradient."""
    same_mean_as: str = ""
    """Of a term without `pointwise`: the label of the one whose expected gradient it has, but for `shrink`."""
    later: bool = False
    """Whether a token answers for those after it, too."""
    weighted: bool = False
    """Whether samples of another policy are weighted for the token's ratio."""
    analytic: bool = False
    """Whether the sum over next tokens is taken instead of a sample, so that none is too rare to be drawn."""

    @property
    def label(self) -> str:
        """Name, credit and weights in one line, which no other row shares."""
        named = f"{self.name} {self.credit}".strip()
        return ", ".join(part for part in (named, self.baseline, self.off_policy) if part)

    def shrink(self, group_size: int) -> float:
        """What the expected gradient is multiplied with: subtracting a mean with one's own share in it shrinks."""
        return 1 - 1 / group_size if self.baseline == "group_mean" else 1.0


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


def grouped_configurations(baseline: str, *, off_policy: bool) -> list[Configuration]:
    """k1 in reward with the baseline that the trainer gives its rewards, for the whole gradient.

    Off-policy with weights only: without them the baseline would change the expected gradient.
    """
    found = []
    for credit in ("sequence", "to_go"):
        for kind in [k for k in OFF_POLICY if k != "none"] if off_policy else [""]:
            spec = KLSpec(name="k1_in_reward", credit=credit, off_policy=kind or "none", baseline=baseline)
            row = Configuration(
                name=spec.name,
                credit=credit,
                off_policy=kind,
                baseline=baseline,
                origin="kl_plugins.kl_terms",
                gradient_of=spec.gradient_of,
                coefficients=_ours(spec),
            )
            found.append(replace(row, same_mean_as=replace(row, baseline="").label))
    return found


def reward_configuration(objective: Objective) -> Configuration:
    """The reward's own part of the loss as a term: minus its policy gradient, in the unit of grad E[R].

    Off-policy with the token's importance weight, where another policy drew under PPO's clip, as the trainers have it.
    """

    def coefficients(tokens: Tokens) -> Coefficients:
        assert tokens.rewards is not None
        cost = -objective.advantages(tokens.rewards).to(tokens.logp)[:, None].expand_as(tokens.logp)
        behavior = tokens.logp if tokens.behavior_logp is None else tokens.behavior_logp
        log_rho = torch.where(tokens.mask, tokens.logp - behavior, 0.0)
        weight = log_rho.exp().clamp(max=KLSpec.weight_clip[1])
        if tokens.host_behavior_logp is not None:
            weight, _ = ppo_clip(weight, torch.zeros_like(tokens.mask), log_rho, cost, KLSpec.clip_epsilon)
        return Coefficients(score=weight * cost, local=torch.zeros_like(cost))

    return Configuration(name="reward", origin="kl_plugins.audit", coefficients=coefficients)


def host_configurations(*, grouped: bool = False) -> tuple[list[Configuration], list[str]]:
    """What TRL, OpenRLHF and verl do themselves, by their own functions where they can be run; and what can't be.

    If `grouped`, also what has no gradient of one completion (RLOO's, whose rows depend on their group).
    """
    found, problems = [], []
    for host in HOSTS:
        terms, problem = installed(host)
        found += [of_host(host, term) for term in terms if grouped or not term.subject.grouped]
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
            group_size=tokens.group_size if spec.baseline else None,
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
        scored = Scored(
            logp=logp, ref_logp=ref_logp, mask=tokens.mask, old_logp=old_logp, group_size=tokens.group_size or 1
        )
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
        pointwise=None if term.subject.grouped else pointwise,
        same_mean_as="k1_in_reward sequence" if term.subject.grouped else "",  # RLOO's, the only one
        later=term.where == "reward",
        weighted=bool(term.off_policy),
    )
