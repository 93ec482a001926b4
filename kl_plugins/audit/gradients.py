"""From scored completions of one prompt to the gradients of every KL term, and of the divergences themselves.

A gradient here is with respect to an additive change of the logits that is linear in the last hidden state: the
weight of the language-model head (where a model transforms its logits after the head, of a linear map added to them).
Its per-token score is (one_hot(y_t) - pi(.|s_t)) (outer) h_t, so that one forward pass of policy and reference gives
the gradient of any number of terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kl_plugins.audit.configurations import Coefficients, Configuration, Pointwise, Tokens
from kl_plugins.audit.objective import Objective
from kl_plugins.audit.sketch import Sketch
from kl_plugins.core.terms import assign_credit

TARGETS = ("reverse_kl", "local_reverse_kl", "local_forward_kl")
PREFIX_BOUND = 10.0
"""Of the ratios' product before a token, in the control variate: any function of the prefix leaves the mean alone."""


@dataclass(frozen=True, kw_only=True)
class ScoredCompletions:
    """Completions of one prompt, scored by policy and reference."""

    tokens: Tensor
    """(B, T) int64."""
    mask: Tensor
    """(B, T) bool: the token was sampled; False after the end."""
    logits: Tensor
    """(B, T, V) of the policy, at the position that predicts the token."""
    ref_logits: Tensor
    """(B, T, V) of the reference."""
    hidden: Tensor
    """(B, T, H): what the policy's head makes its logits of."""
    behavior_logp: Tensor | None = None
    """(B, T), nats, of the policy that sampled the tokens; None: on-policy."""
    host_behavior_logp: Tensor | None = None
    """(B, T), nats, what a host would take its ratio against; None: on-policy to it."""

    @property
    def stale(self) -> bool:
        """Whether another policy drew the tokens, and not just another engine."""
        return self.behavior_logp is not None and self.host_behavior_logp is not None


class _Exact:
    """What is computed over the whole vocabulary; vectors over V are made when asked for, and not kept."""

    def __init__(self, scored: ScoredCompletions) -> None:
        self.mask = scored.mask
        self.logp, self.ref_logp = scored.logits.log_softmax(-1), scored.ref_logits.log_softmax(-1)
        self.p = self.logp.exp()
        self.pu = torch.where(self.p > 0, self.p * (self.logp - self.ref_logp), 0.0)
        self.kl = torch.where(self.mask, self.pu.sum(-1), 0.0)
        """(B, T): KL(policy || reference) of the next token."""

    def of(self, logp: Tensor, tokens: Tensor) -> Tensor:
        return logp.gather(-1, tokens[..., None])[..., 0]

    def score(self, tokens: Tensor) -> Tensor:
        return torch.zeros_like(self.p).scatter_(-1, tokens[..., None], 1.0) - self.p

    def local_reverse(self) -> Tensor:
        return self.pu - self.p * self.kl[..., None]

    def averaged(self, pointwise: Pointwise) -> tuple[Tensor, Tensor]:
        """(B, T, V) p_v k_v of a coefficient k at each next token v, and its (B, T) sum, 0 where masked."""
        logp, ref_logp = (x.flatten(0, 1) for x in (self.logp, self.ref_logp))
        k = pointwise(logp, ref_logp).view_as(self.p).to(self.p)
        p_times_k = torch.where(self.p > 0, self.p * k.nan_to_num(0.0), 0.0)
        return p_times_k, torch.where(self.mask, p_times_k.sum(-1), 0.0)

    def local_forward(self) -> Tensor:
        return self.p - self.ref_logp.exp()


@torch.no_grad()
def target_gradients(scored: ScoredCompletions, sketch: Sketch) -> Tensor:
    """(3, B, K): single-completion estimates of the gradients of `TARGETS`, for completions drawn by the policy.

    Within a step nothing is sampled: the local parts are sums over the vocabulary, and the score of token t carries
    the exact next-token divergences after it (Amini et al., arXiv 2504.10637; Tang and Munos, arXiv 2506.09477).
    """
    exact = _Exact(scored)
    _require_finite(exact, scored)
    later = _later(exact.kl)
    reverse = exact.local_reverse()
    whole = reverse + later[..., None] * exact.score(scored.tokens)
    parts = [sketch.outer(part, scored.hidden) for part in (whole, reverse, exact.local_forward())]
    return torch.stack([(part * scored.mask[..., None]).sum(1) for part in parts])


@dataclass(frozen=True, kw_only=True)
class TermGradients:
    """What C terms add to the gradient for each of B completions, before beta."""

    sampled: Tensor
    """(C, B, K): as training gets it."""
    expected: Tensor
    """(C, B, K) of the same mean, with less noise where there is a `pointwise`: on-policy the average over every next
    token at each prefix, as in `target_gradients`; off-policy what a control variate leaves (see `_control`)."""
    unseen: Tensor
    """(C, 4) sums over prefixes: of E|coefficient|, the part of it on tokens rarer than `rare`, 1, and those tokens'
    probability. 0 where no next token is drawn."""
    coefficients: list[Coefficients]
    tokens: Tokens


@torch.no_grad()
def term_gradients(
    configurations: Sequence[Configuration],
    scored: ScoredCompletions,
    sketch: Sketch,
    *,
    rare: float,
    rewards: Tensor | None = None,
    group_size: int | None = None,
) -> TermGradients:
    """The gradients of each configuration's term on a micro-batch; of whole groups if `group_size` is given."""
    exact = _Exact(scored)
    _require_finite(exact, scored)
    tokens = Tokens(
        logp=exact.of(exact.logp, scored.tokens),
        ref_logp=exact.of(exact.ref_logp, scored.tokens),
        mask=scored.mask,
        behavior_logp=scored.behavior_logp,
        host_behavior_logp=scored.host_behavior_logp,
        kl=exact.kl,
        rewards=rewards,
        group_size=group_size,
    )
    found = [configuration.coefficients(tokens) for configuration in configurations]
    of_score, of_local = (
        torch.stack([getattr(c, part).nan_to_num(0.0, 0.0, 0.0) * scored.mask for c in found]).to(exact.p)
        for part in ("score", "local")
    )
    score = sketch.outer(exact.score(scored.tokens), scored.hidden) * scored.mask[..., None]
    sampled = torch.einsum("cbt,btk->cbk", of_score, score)
    if of_local.any():
        local = sketch.outer(exact.local_reverse(), scored.hidden)
        sampled += torch.einsum("cbt,btk->cbk", of_local, local)

    expected, unseen = sampled.clone(), sampled.new_zeros(len(found), 4)
    rarely = (exact.p < rare) & scored.mask[..., None]
    probability = torch.stack([scored.mask.sum(), exact.p[rarely].sum()])
    for pointwise in {c.pointwise for c in configurations if c.pointwise is not None}:
        p_times_k, mean = exact.averaged(pointwise)
        rows = [i for i, c in enumerate(configurations) if c.pointwise is pointwise]
        size = p_times_k.abs() * scored.mask[..., None]
        of_size = torch.stack([size.sum(), size[rarely].sum()])
        unseen[[i for i in rows if not configurations[i].analytic]] = torch.cat([of_size, probability])
        drawn = pointwise(tokens.logp, tokens.ref_logp).to(mean).nan_to_num(0.0, 0.0, 0.0)
        local = sketch.outer(p_times_k - exact.p * mean[..., None], scored.hidden) * scored.mask[..., None]
        for i in rows:
            if scored.stale and not configurations[i].weighted:
                continue  # the ratios would add more noise than they take away
            before, known = _control(tokens, configurations[i], drawn, mean)
            expected[i] -= torch.einsum("bt,btk->bk", known, score)
            if not configurations[i].analytic:
                expected[i] += torch.einsum("bt,btk->bk", before, local)
    return TermGradients(sampled=sampled, expected=expected, unseen=unseen, coefficients=found, tokens=tokens)


def whole_gradients(sampled: Tensor, shrinks: list[float], objective: Objective) -> Tensor:
    """(C + 1, B / G, K) whole gradients of each group, first that of the reward alone.

    Args:
        sampled: (C + 1, B, K), of C KL terms and then of the reward, for each completion.
        shrinks: For each term what its expected gradient is multiplied with.
        objective: beta and G are read.
    """
    terms, reward = sampled[:-1], sampled[-1:]
    betas = torch.tensor([objective.beta / shrink for shrink in shrinks], dtype=sampled.dtype, device=sampled.device)
    whole = torch.cat([reward, reward + betas[:, None, None] * terms])
    groups: Tensor = whole.unflatten(1, (-1, objective.group_size)).mean(2)
    return groups


def _control(tokens: Tokens, configuration: Configuration, drawn: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of prefixes, and coefficients of the score whose mean is known, (B, T) each: a control variate.

    With a weight A_t of the prefix alone and the ratio rho_t of the token, A_t rho_t k_t score_t has, under whatever
    policy drew the token, the mean A_t sum_v p_v k_v score_v: taking the one for the other leaves every mean as it was
    and averages out the noise within the step, on-policy all of it. What later tokens bring likewise, less their mean
    over the *other* completions, a baseline.
    """
    behavior = tokens.logp if tokens.behavior_logp is None else tokens.behavior_logp
    log_rho = torch.where(tokens.mask, tokens.logp - behavior, 0.0)
    before = torch.ones_like(log_rho)
    if configuration.off_policy in ("prefix", "sequence"):
        before = (log_rho.cumsum(-1) - log_rho).exp().clamp(max=PREFIX_BOUND)
    weight = before * log_rho.exp() * tokens.mask
    known = torch.zeros_like(weight) if configuration.analytic else weight * drawn
    if configuration.credit == "sequence":  # earlier coefficients are part of the prefix
        earlier = torch.where(tokens.mask, drawn, 0.0)
        known = known + weight * (earlier.cumsum(-1) - earlier)
    if configuration.later:
        if not configuration.analytic:
            apart = weight * drawn - before * mean
            known = known + assign_credit(apart, "to_go") - apart
        if len(mean) > 1:
            later = assign_credit(before * mean, "to_go") - before * mean
            known = known + weight * (later.sum(0) - later) / (len(mean) - 1)
    return before, known * tokens.mask


def _later(x: Tensor) -> Tensor:
    """(B, T) sums of x over the tokens after each, less their mean over the *other* completions: a baseline."""
    later = assign_credit(x, "to_go") - x
    if len(later) == 1:
        return later
    others: Tensor = (later.sum(0) - later) / (len(later) - 1)
    return later - others


def _require_finite(exact: _Exact, scored: ScoredCompletions) -> None:
    taken = torch.stack([exact.of(x, scored.tokens) for x in (exact.logp, exact.ref_logp)])
    bad = scored.mask & ~(taken.isfinite().all(0) & exact.kl.isfinite())
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        policy, reference = taken[:, row, column].tolist()
        raise ValueError(
            f"{int(bad.sum())} of {int(scored.mask.sum())} sampled tokens have a log-probability or next-token KL "
            f"that isn't finite, the first at completion {row}, token {column}: policy {policy}, reference "
            f"{reference}, KL {exact.kl[row, column].item()}; mend the model that gave it (--dtype float32 if it "
            "overflows in half precision)"
        )
