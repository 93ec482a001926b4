"""`kl_terms`: from log-probabilities to a per-token loss with the right gradient.

Everything stands on one surrogate (Liu et al., arXiv 2510.01555, section on "in reward" and "as loss"),

    loss_t = detach(v_t) + detach(w_t * c_t) * (logp_t - detach(logp_t)),

whose forward value is the estimate v_t and whose gradient is w_t * c_t * grad log pi(y_t).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kl_plugins.core.estimators import k3_derivative
from kl_plugins.core.exact import ExactKL
from kl_plugins.core.spec import KLSpec
from kl_plugins.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class KLTerms:
    """What `kl_terms` returns. Every (B, T) tensor but `loss` is detached and 0 where a token doesn't count."""

    loss: Tensor
    """(B, T), nats. Forward value `value`, gradient `score_coefficient * grad logp`; of an exact KL also the weighted
    gradient of the divergence itself."""
    value: Tensor
    """(B, T), nats. The unweighted per-token KL, sampled or exact."""
    coefficient: Tensor
    """(B, T). c_t, with credit assigned and the baseline subtracted, before any importance weight."""
    weight: Tensor
    """(B, T). w_t, after `weight_clip` and `clip="separate"`."""
    score_coefficient: Tensor
    """(B, T). What multiplies the score: `weight * coefficient`, except with `off_policy="prefix"` and credit
    `"to_go"` or `"sequence"`, where each log-ratio carries the weight of the prefix it was drawn with."""
    log_ratio: Tensor
    """(B, T), nats. `logp - ref_logp`; 0 also at a left-out token that the reference could not score."""
    mask: Tensor
    """(B, T) bool. The tokens that counted: `mask` less what `nonfinite="drop"` dropped."""
    cut: Tensor
    """(B, T) bool. Tokens whose importance weight was truncated, masked or clipped."""
    unscored: Tensor
    """(B, T) bool. Counted tokens whose `behavior_logp` was NaN, and whose ratio was taken as 1."""
    dropped: Tensor
    """(B, T) bool. Tokens that `nonfinite="drop"` dropped."""
    left_out: Tensor
    """(B, T) bool. Counted tokens whose own KL was left out (`left_out_tokens`, `left_out_positions`)."""


def kl_terms(
    spec: KLSpec,
    *,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    behavior_logp: Tensor | None = None,
    group_size: int | None = None,
    baseline: Tensor | None = None,
    left_out_tokens: Tensor | None = None,
    left_out_positions: Tensor | None = None,
    exact: ExactKL | None = None,
) -> KLTerms:
    """The KL-to-reference term of a batch of sampled sequences.

    Args:
        spec: The configuration.
        logp: (B, T), nats, the current policy's, with its graph. Half precision is cast to float32 here, once.
        ref_logp: (B, T), nats, the frozen reference's. It may be -inf or NaN at a left-out token of which nothing
            else is used either: every one under credit `"token"`, otherwise those of `left_out_positions`.
        mask: (B, T) of 0 and 1 (or bool), 1 where the token counts. A masked position contributes exactly nothing,
            whatever it holds.
        behavior_logp: (B, T), nats, of the policy that sampled the tokens: the rollout engine's own if known, else
            the trainer's old policy. None: on-policy. NaN (not scored by the engine): ratio 1 at that token, counted.
        group_size: Completions per prompt, consecutive rows; needed by `baseline="leave_one_out"`.
        baseline: (B, T), a baseline computed elsewhere from *other* samples, used instead of the batch's own groups.
        left_out_tokens: (B, T) of 0 and 1, 1 where a token's own KL is left out because of *which* token it is (an
            end of sequence, say). The divergence is then the generalized one over the other tokens of the vocabulary,
            sum_v m_v (p_v log(p_v / r_v) - p_v + r_v), which is 0 only where policy and reference agree on them.
            Under credit `"to_go"` and `"sequence"` a left-out token still answers for what follows it, and for what
            comes before it its cost is 1 - exp(-u), whose mean is what leaving it out changes of that divergence
            (bounded at `spec.left_out_bound`): there the reference has to score it.
        left_out_positions: (B, T) of 0 and 1, 1 where it is left out because of where it stands, whatever token it
            is; it may depend on what comes before. Such a token costs nothing and answers for what follows.
        exact: For the exact configurations, and only for them: `kl_plugins.exact_kl` of the same batch.

    Returns:
        `KLTerms`. The sum of `loss` over tokens, averaged over sequences, has the expected gradient
        `spec.gradient_of` on-policy; `spec.off_policy` says what of it remains true off-policy.

    Raises:
        `ValueError`: shapes that differ, a mask that isn't 0/1, a NaN or inf at a counted token (unless
            `spec.nonfinite="drop"`), or groups that don't divide the batch.
        `ConfigError`: `baseline="leave_one_out"` with neither `group_size` nor `baseline`; `left_out_tokens` with a
            configuration whose later costs are no log-ratios; an exact configuration without `exact`, or with one
            that was made for another.
    """
    logp, ref_logp, behavior_logp, counted, dropped, left_out = _checked(
        spec, logp, ref_logp, mask, behavior_logp, exact, tokens=left_out_tokens, positions=left_out_positions
    )
    log_ratio = (logp - ref_logp).detach()
    unscored = behavior_logp.isnan()
    log_rho = torch.where(unscored, 0.0, logp.detach() - behavior_logp)

    if exact is not None:
        return _exact_terms(
            spec,
            exact,
            logp,
            log_ratio,
            log_rho,
            counted,
            left_out.any,
            unscored,
            dropped,
            group_size=group_size,
            baseline=baseline,
        )
    costs, credited = _credited(spec, log_ratio, counted, left_out)
    value = torch.where(counted & ~left_out.any, _bounded(spec.loss.value(log_ratio)), 0.0)
    coefficient = torch.where(counted, credited, 0.0)
    subtracted = torch.where(counted, _baseline(spec, credited, counted, group_size, baseline), 0.0)
    reduced = _bounded(coefficient - subtracted)

    weight, cut = importance_weight(log_rho, counted, spec)
    if spec.clip is not None:
        weight, cut = _ppo_clip(weight, cut, log_rho, reduced, spec.clip_epsilon)
    weighted = _weighted_credit(costs, coefficient, weight, spec) - _bounded(weight * subtracted)
    score_coefficient = torch.where(counted, _bounded(weighted), 0.0)
    return KLTerms(
        loss=surrogate(logp=logp, value=value, score_coefficient=score_coefficient),
        value=value,
        coefficient=reduced,
        weight=weight,
        score_coefficient=score_coefficient,
        log_ratio=log_ratio,
        mask=counted,
        cut=cut,
        unscored=unscored,
        dropped=dropped,
        left_out=left_out.any,
    )


def require_policy_scores(spec: KLSpec, *, logp: Tensor, mask: Tensor, host: str) -> None:
    """Raise `ValueError` if `nonfinite="drop"` would hide a NaN of the policy, which the host's own loss spreads."""
    if spec.nonfinite == "drop" and (logp.isnan() & mask.bool()).any():
        raise ValueError(
            f"the policy's log-probs hold a NaN, which {host}'s own loss would spread to every parameter: "
            "nonfinite='drop' can only leave out tokens that the reference or the engine could not score"
        )


def surrogate(*, logp: Tensor, value: Tensor, score_coefficient: Tensor) -> Tensor:
    """`detach(value) + detach(score_coefficient) * (logp - detach(logp))`, all (B, T).

    Its gradient is `score_coefficient * grad logp`: no exp() in the backward pass, nothing to overflow or cancel.
    """
    return value.detach() + score_coefficient.detach() * (logp - logp.detach())


def assign_credit(x: Tensor, credit: str | None, gamma: float = 1.0) -> Tensor:
    """Sum per-token terms (B, T) over the tokens that each token answers for.

    `"token"`: x_t. `"to_go"`: sum_{s>=t} gamma^(s-t) x_s. `"sequence"`: sum_s x_s, at every t.
    """
    if credit == "sequence":
        return x.sum(-1, keepdim=True).expand_as(x)
    if credit == "to_go":
        shift, length = 1, x.size(-1)
        while shift < length:  # parallel scan: after step k, position t holds its first 2^k terms
            x = x + gamma * torch.nn.functional.pad(x[:, shift:], (0, shift))
            shift, gamma = 2 * shift, gamma * gamma
    return x


def leave_one_out_baseline(
    spec: KLSpec,
    *,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    group_size: int,
    left_out_tokens: Tensor | None = None,
    left_out_positions: Tensor | None = None,
    exact: ExactKL | None = None,
) -> Tensor:
    """(B, T) `baseline` for `kl_terms`: for each row the mean coefficient of the *other* rows of its group.

    For hosts that split groups over micro-batches or processes: computed once from whole groups (consecutive rows)
    and the log-probs at rollout. It is a function of other samples, so that the expected gradient stays what it was
    when the policy has moved on. Arguments and errors as those of `kl_terms`.
    """
    logp, ref_logp, _, counted, _, left_out = _checked(
        spec, logp.detach(), ref_logp, mask, None, exact, tokens=left_out_tokens, positions=left_out_positions
    )
    if exact is not None:
        _, _, _, credited = _exact_credit(spec, exact, logp - ref_logp, counted & ~left_out.any)
    else:
        _, credited = _credited(spec, logp - ref_logp, counted, left_out)
    return _leave_one_out(credited, counted, group_size, spec.credit)


@dataclass(frozen=True, kw_only=True)
class _LeftOut:
    """Counted tokens whose own KL is left out, both (B, T) bool."""

    any: Tensor
    by_token: Tensor
    """Those that are left out because of which token they are, where another one would have had a cost."""

    @classmethod
    def of(cls, spec: KLSpec, counted: Tensor, *, tokens: Tensor | None, positions: Tensor | None) -> _LeftOut:
        if tokens is not None and not spec.can_leave_tokens_out:
            raise ConfigError(
                f"left_out_tokens with {spec.name!r} and credit={spec.credit!r}: what a left-out token costs those "
                "before it is known for k1 only, and an exact KL sums over all tokens; use 'k1_in_reward', or a "
                "sampled KL with credit='token'"
            )
        given = {"left_out_tokens": tokens, "left_out_positions": positions}
        found = {name: tensor for name, tensor in given.items() if tensor is not None}
        _same_shape({"mask": counted} | found)
        for name, tensor in found.items():
            if ((tensor != 0) & (tensor != 1)).any():
                raise ValueError(f"{name} must be 0 or 1: 1 leaves the KL of a token out")
        nothing = torch.zeros_like(counted)
        by_position = nothing if positions is None else counted & positions.bool()
        by_token = nothing if tokens is None else counted & tokens.bool() & ~by_position
        return cls(any=by_position | by_token, by_token=by_token)

    def without_reference(self, credit: str | None) -> Tensor:
        """(B, T) bool. Where the reference's log-prob is in no term."""
        return self.any if credit == "token" else self.any & ~self.by_token

    def among(self, counted: Tensor) -> _LeftOut:
        """Those of them that are counted."""
        return _LeftOut(any=self.any & counted, by_token=self.by_token & counted)


def _credited(
    spec: KLSpec, log_ratio: Tensor, counted: Tensor, left_out: _LeftOut
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(B, T) costs before credit is assigned (to the token itself and to earlier ones), and coefficients after it.

    A masked token can still answer for later ones. What earlier tokens pay is an unbiased estimate of the divergence
    at that state: u on the whole vocabulary; where a set of tokens is left out, u for the others and 1 - exp(-u) for
    those, since sum_{v kept} (p log(p/r) - p + r) = E[u 1{kept}] + E[(1 - exp(-u)) 1{left out}].
    """
    pointwise = _bounded(spec.loss.coefficient(log_ratio), spec.coefficient_bound)
    pointwise = torch.where(counted & ~left_out.any, _summable(pointwise, spec.credit), 0.0)
    if spec.credit == "token":
        return (pointwise, pointwise), pointwise
    instead = _summable(_bounded(k3_derivative(log_ratio), spec.left_out_bound), spec.credit)
    to_earlier = torch.where(left_out.by_token, instead, pointwise)
    return (pointwise, to_earlier), assign_credit(to_earlier, spec.credit, spec.gamma) + (pointwise - to_earlier)


def _leave_one_out(credited: Tensor, counted: Tensor, group_size: int, credit: str | None) -> Tensor:
    """The mean over the other members of a group (consecutive rows), at the same position.

    Only members that have something to answer for at the position are averaged; where there is none the baseline is
    0. A row's own coefficient has no part in it, not even by rounding (Ahmadian et al., arXiv 2402.14740).
    """
    batch, length = credited.shape
    if group_size < 2 or batch % group_size:
        raise ValueError(
            f"leave_one_out with group_size={group_size} on a batch of {batch} rows: groups must have at least 2 "
            "members and divide the batch; pass the number of completions per prompt"
        )
    answers = (assign_credit(counted.to(credited.dtype), credit) > 0).to(credited.dtype)
    groups = (batch // group_size, group_size, length)
    others = 1 - torch.eye(group_size, dtype=credited.dtype, device=credited.device)
    with torch.autocast(credited.device.type, enabled=False):  # which would round to half precision
        count = torch.einsum("ij,gjt->git", others, answers.view(*groups))
        mean = torch.einsum("ij,gjt->git", others / group_size, credited.view(*groups))
    return _bounded(mean * (group_size / count.clamp(min=1))).reshape(batch, length)


def importance_weight(log_rho: Tensor, mask: Tensor, spec: KLSpec, *, of_state: bool = False) -> tuple[Tensor, Tensor]:
    """The bounded importance weight and where it was cut, both (B, T).

    Args:
        log_rho: log pi_theta - log mu per token, 0 where the token doesn't count.
        mask: bool.
        spec: `off_policy`, `weight_clip` and `weight_clip_mode` are read.
        of_state: For what is averaged over the token already and depends on the prefix only: without the token's own
            ratio. `"token"` is then 1, `"prefix"` the product of the ratios before the token.

    An unbounded weight saturates at the square root of the largest finite number, so that its square is finite.
    """
    if spec.off_policy == "prefix":
        log_rho = torch.nn.functional.pad(log_rho, (1, -1)) if of_state else log_rho
        log_rho = log_rho.cumsum(-1)
    elif spec.off_policy == "sequence":
        log_rho = log_rho.sum(-1, keepdim=True).expand_as(log_rho)
    elif spec.off_policy == "none" or of_state:
        log_rho = torch.zeros_like(log_rho)
    low, high = spec.weight_clip
    high = min(high, math.sqrt(torch.finfo(log_rho.dtype).max))
    ratio = log_rho.exp()
    cut = mask & ((ratio < low) | (ratio > high))
    ratio = ratio.clamp(low, high) if spec.weight_clip_mode == "truncate" else ratio.masked_fill(cut, 0)
    return torch.where(mask, ratio, 0.0), cut


def _ppo_clip(weight: Tensor, cut: Tensor, log_rho: Tensor, cost: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Zero weight where the gradient of max(rho c, clip(rho, 1 - eps, 1 + eps) c) is zero (PPO, with advantage -c)."""
    rho = log_rho.exp()
    clipped = ((cost > 0) & (rho < 1 - epsilon)) | ((cost < 0) & (rho > 1 + epsilon))
    return weight.masked_fill(clipped, 0), cut | clipped


def _weighted_credit(costs: tuple[Tensor, Tensor], coefficient: Tensor, weight: Tensor, spec: KLSpec) -> Tensor:
    """w_t * c_t; with prefix weights the terms of c_t at s are weighted by the ratios up to max(s, t) instead.

    That is unbiased, since E_mu[prod_{r<=max(s,t)} rho_r u_s score_t] = E_pi[u_s score_t].
    """
    if spec.off_policy != "prefix" or spec.credit == "token":
        return _bounded(weight * coefficient)
    pointwise, to_earlier = costs
    later = assign_credit(_summable(weight * to_earlier, spec.credit), "to_go", spec.gamma)
    later = later + _bounded(weight * (pointwise - to_earlier))
    if spec.credit == "to_go":
        return later
    earlier = torch.nn.functional.pad(to_earlier.cumsum(-1)[:, :-1], (1, 0))
    return later + _bounded(weight * earlier)


def _baseline(spec: KLSpec, credited: Tensor, counted: Tensor, group_size: int | None, given: Tensor | None) -> Tensor:
    if spec.baseline is None:
        if given is not None:
            raise ConfigError("a baseline was passed, but the configuration has none: set baseline='leave_one_out'")
        return torch.zeros_like(credited)
    if given is not None:
        _same_shape({"logp": credited, "baseline": given})
        if not (given.isfinite() | ~counted).all():
            raise ValueError("the baseline that was passed is not finite at a counted token: it must be everywhere")
        return given.detach().to(credited.dtype)
    if group_size is None:
        raise ConfigError("baseline='leave_one_out' was asked for without groups: pass group_size (or baseline)")
    return _leave_one_out(credited, counted, group_size, spec.credit)


def _bounded(x: Tensor, bound: float | None = None) -> Tensor:
    """At most `bound`, None: the largest finite number. An overflow stays what it was, large, with its sign."""
    limit = torch.finfo(x.dtype).max if bound is None else bound
    return x.clamp(-limit, limit)


def _summable(x: Tensor, credit: str | None) -> Tensor:
    """Bounded so that the sums over (B, T) that `credit` takes don't overflow either, and none is inf - inf."""
    return x if credit == "token" else _bounded(x, torch.finfo(x.dtype).max / max(x.size(-1), 1))


def _checked(
    spec: KLSpec,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    behavior_logp: Tensor | None,
    exact: ExactKL | None,
    *,
    tokens: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, _LeftOut]:
    """Inputs in full precision with 0 at every position that doesn't count; those counted, dropped and left out."""
    _check_exact(spec, exact)
    behavior_logp = logp.detach() if behavior_logp is None else behavior_logp.detach()
    more = {} if exact is None else {"exact_kl": exact.value.detach()}
    _same_shape({"logp": logp, "ref_logp": ref_logp, "mask": mask, "behavior_logp": behavior_logp, **more})
    dtype = torch.promote_types(logp.dtype, torch.float32)
    narrow = torch.finfo(logp.dtype).max
    logp, ref_logp, behavior_logp = (x.to(dtype) for x in (logp, ref_logp.detach(), behavior_logp))
    if logp.requires_grad and narrow < torch.finfo(dtype).max:  # the gradient is cast back, and must not become inf
        logp.register_hook(lambda gradient: gradient.clamp(-narrow, narrow))
    counted = mask.bool()
    left_out = _LeftOut.of(spec, counted, tokens=tokens, positions=positions)
    unused = left_out.without_reference(spec.credit) & ~ref_logp.isfinite()
    ref_logp = torch.where(unused, logp.detach(), ref_logp)
    not_binary = (mask != 0) & (mask != 1)
    nonfinite = counted & ~(logp.isfinite() & ref_logp.isfinite() & ~behavior_logp.isinf())
    for kl in more.values():
        nonfinite |= counted & ~kl.isfinite()
    any_not_binary, any_nonfinite = torch.stack([not_binary.any(), nonfinite.any()]).tolist()  # one sync
    if any_not_binary:
        raise ValueError(f"mask must be 0 or 1, found {mask[not_binary][0].item()}: 1 counts a token, 0 leaves it out")
    if any_nonfinite and spec.nonfinite == "error":
        raise ValueError(
            _nonfinite_message(nonfinite, logp=logp, ref_logp=ref_logp, behavior_logp=behavior_logp, **more)
        )
    counted = counted & ~nonfinite
    logp, ref_logp, behavior_logp = (torch.where(counted, x, 0.0) for x in (logp, ref_logp, behavior_logp))
    return logp, ref_logp, behavior_logp, counted, nonfinite, left_out.among(counted)


def _same_shape(tensors: dict[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"kl_terms needs (batch, tokens) tensors of one shape, found {found}")


def _nonfinite_message(where: Tensor, **tensors: Tensor) -> str:
    row, column = where.nonzero()[0].tolist()
    found = ", ".join(f"{name}={tensor[row, column].item()}" for name, tensor in tensors.items())
    return (
        f"{int(where.sum())} counted tokens have a log-probability that is not finite, the first at row {row}, "
        f"position {column}: {found}; mask them, mend the model that gave them, or drop and count them with "
        "nonfinite='drop'"
    )


def _check_exact(spec: KLSpec, exact: ExactKL | None) -> None:
    if exact is not None and spec.loss.exact:
        exact.check(spec)
    elif exact is not None:
        raise ConfigError(f"exact was passed for {spec.name}, which is sampled: leave it out, or use exact_in_reward")
    elif spec.loss.exact:
        raise ConfigError(
            f"{spec.name} sums over the vocabulary, but only the sampled tokens' log-probs were passed: pass "
            "exact=exact_kl(spec, logits=..., ref_logits=..., mask=...)"
        )


def _exact_credit(
    spec: KLSpec, exact: ExactKL, log_ratio: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, T) each: the divergence with its graph, what a sampled tail adds to its value and to the coefficient, and
    the coefficient: the KLs of strictly later tokens, and that of the tail.

    The token's own KL in it would not change the expected gradient, E[score] = 0, only the variance.
    """
    kl = torch.where(counted, exact.value, 0.0)
    tail = counted & exact.outside
    value = torch.where(tail, _summable(spec.loss.value(log_ratio), "to_go"), 0.0)
    coefficient = torch.where(tail, _bounded(spec.loss.coefficient(log_ratio), spec.coefficient_bound), 0.0)
    return kl, value, coefficient, _bounded(_of_later(kl.detach() + value, spec) + coefficient)


def _of_later(x: Tensor, spec: KLSpec) -> Tensor:
    """sum_{s>t} gamma^(s-t) x_s with credit `"to_go"`, 0 with `"token"`."""
    if spec.credit == "token":
        return torch.zeros_like(x)
    to_go = assign_credit(_summable(x, spec.credit), "to_go", spec.gamma)
    return spec.gamma * torch.nn.functional.pad(to_go[:, 1:], (0, 1))


def _exact_terms(
    spec: KLSpec,
    exact: ExactKL,
    logp: Tensor,
    log_ratio: Tensor,
    log_rho: Tensor,
    counted: Tensor,
    left_out: Tensor,
    unscored: Tensor,
    dropped: Tensor,
    *,
    group_size: int | None,
    baseline: Tensor | None,
) -> KLTerms:
    """grad E[sum_t KL_t] = E[sum_t (grad KL_t + (sum_{s>t} KL_s) score_t)], each half with the weight of its own.

    KL_t is averaged over the token: its weight is that of the state, prod_{s<t} rho_s with `off_policy="prefix"`. So
    is that of a later KL_s in the coefficient of token t. What a sampled token stands for (the tail, the baseline) has
    the inclusive weight.
    """
    kl, tail_value, tail_coefficient, credited = _exact_credit(spec, exact, log_ratio, counted & ~left_out)
    value = _bounded(kl.detach() + tail_value)
    coefficient = torch.where(counted, credited, 0.0)
    subtracted = torch.where(counted, _baseline(spec, credited, counted, group_size, baseline), 0.0)
    reduced = _bounded(coefficient - subtracted)

    of_state, state_cut = importance_weight(log_rho, counted, spec, of_state=True)
    weight, cut = importance_weight(log_rho, counted, spec)
    if spec.clip is not None:
        weight, cut = _ppo_clip(weight, cut, log_rho, reduced, spec.clip_epsilon)
    if spec.off_policy == "prefix":
        later = _of_later(of_state * kl.detach() + _bounded(weight * tail_value), spec)
        weighted = later + _bounded(weight * (tail_coefficient - subtracted))
    else:
        weighted = weight * reduced
    score_coefficient = torch.where(counted, _bounded(weighted), 0.0)
    scored = spec.credit != "token" or exact.top_k is not None
    return KLTerms(
        loss=surrogate(logp=logp, value=value, score_coefficient=score_coefficient) + of_state * (kl - kl.detach()),
        value=value,
        coefficient=reduced,
        weight=weight if scored else of_state,
        score_coefficient=score_coefficient,
        log_ratio=log_ratio,
        mask=counted,
        cut=cut | state_cut if scored else state_cut,
        unscored=unscored,
        dropped=dropped,
        left_out=left_out,
    )
