"""`kl_terms`: from log-probabilities to a per-token loss with the right gradient.

Everything stands on one surrogate (Liu et al., arXiv 2510.01555, section on "in reward" and "as loss"),

    loss_t = detach(v_t) + detach(w_t * c_t) * (logp_t - detach(logp_t)),

whose forward value is the estimate v_t and whose gradient is w_t * c_t * grad log pi(y_t). `kl_terms` takes it in the
steps costs (sampled or exact), credit, baseline, weight, clip, surrogate; an exact KL adds its own gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kl_plugins.core.baseline import group_share, leave_one_out
from kl_plugins.core.checks import LeftOut, check_baseline, check_groups, checked
from kl_plugins.core.estimators import k3_derivative
from kl_plugins.core.exact import ExactKL
from kl_plugins.core.spec import KLSpec
from kl_plugins.core.weights import importance_weight, ppo_clip


@dataclass(frozen=True, kw_only=True)
class KLTerms:
    """What `kl_terms` returns. Every (B, T) tensor but `loss` is detached and 0 where a token doesn't count."""

    loss: Tensor
    """(B, T), nats. Forward value `value`, gradient `score_coefficient * grad logp`; of an exact KL also the weighted
    gradient of the divergence itself."""
    value: Tensor
    """(B, T), nats. The unweighted per-token KL, sampled or exact."""
    coefficient: Tensor
    """(B, T). c_t, with credit assigned and the baseline subtracted (of `"group_mean"`: and shrunk), before any
    importance weight."""
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
    """The KL-to-reference term of a batch of B sampled sequences of up to T tokens.

    Args:
        spec: The configuration.
        logp: (B, T), nats, the current policy's, with its graph. Half precision is cast to float32 here, once.
        ref_logp: (B, T), nats, the frozen reference's. It may be -inf or NaN at a left-out token of which nothing
            else is used either: every one under credit `"token"`, otherwise those of `left_out_positions`.
        mask: (B, T) of 0 and 1 (or bool), 1 where the token counts. A masked position contributes exactly nothing,
            whatever it holds.
        behavior_logp: (B, T), nats, of the policy that sampled the tokens: the rollout engine's own if known, else
            the trainer's old policy. None: on-policy. NaN (not scored by the engine): ratio 1 at that token, counted.
        group_size: Completions per prompt, consecutive rows; needed by `spec.baseline`.
        baseline: (B, T), the mean of *other* samples (`leave_one_out_baseline`), computed where groups were whole and
            used instead of the batch's own. `baseline="group_mean"` still needs `group_size`, the size that they had,
            which then need not divide the batch.
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
        `spec.gradient_of` on-policy (1 - 1/group_size times it with `baseline="group_mean"`); `spec.off_policy` says
        what of it remains true off-policy.

    Raises:
        ValueError: shapes that differ, a mask that isn't 0/1, a NaN or inf at a counted token (unless
            `spec.nonfinite="drop"`), or groups that don't divide the batch.
        ConfigError: `spec.baseline` without the `group_size` or `baseline` that it needs; `left_out_tokens` with a
            configuration whose later costs are no log-ratios; an exact configuration without `exact`, or with one
            that was made for another.

    Example:
        >>> logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> spec = KLSpec.from_name("k2_as_loss")
        >>> terms = kl_terms(spec, logp=logp, ref_logp=torch.tensor([[-1.5, -1.0]]), mask=torch.tensor([[1, 1]]))
        >>> terms.loss.sum().backward()
        >>> logp.grad  # the log-ratio
        tensor([[ 0.5000, -1.0000]])
    """
    inputs = checked(
        spec,
        logp=logp,
        ref_logp=ref_logp,
        mask=mask,
        behavior_logp=behavior_logp,
        left_out_tokens=left_out_tokens,
        left_out_positions=left_out_positions,
        exact=exact,
    )
    logp, counted = inputs.logp, inputs.counted
    log_ratio = (logp - inputs.ref_logp).detach()
    unscored = inputs.behavior_logp.isnan()
    log_rho = torch.where(unscored, 0.0, logp.detach() - inputs.behavior_logp)

    costs = _costs(spec, log_ratio, counted, inputs.left_out, exact)
    coefficient = torch.where(counted, costs.credited, 0.0)
    subtracted = torch.where(counted, _baseline(spec, costs.credited, counted, group_size, baseline), 0.0)
    share = group_share(spec.baseline, group_size)
    reduced = share * _bounded(coefficient - subtracted)

    weight, cut = importance_weight(log_rho, counted, spec)
    state_weight, state_cut = importance_weight(log_rho, counted, spec, of_state=True)
    if spec.clip is not None:
        weight, cut = ppo_clip(weight, cut, log_rho, reduced, spec.clip_epsilon)
    weighted = _weighted(spec, costs, weight, state_weight, coefficient, subtracted)
    score_coefficient = torch.where(counted, share * _bounded(weighted), 0.0)

    loss = surrogate(logp=logp, value=costs.value, score_coefficient=score_coefficient)
    if costs.divergence is not None:
        loss = loss + share * state_weight * (costs.divergence - costs.divergence.detach())
        cut = cut | state_cut
        if spec.credit == "token" and spec.top_k is None:  # no token has a coefficient: this gradient is all there is
            weight, cut = state_weight, state_cut
    return KLTerms(
        loss=loss,
        value=costs.value,
        coefficient=reduced,
        weight=weight,
        score_coefficient=score_coefficient,
        log_ratio=log_ratio,
        mask=counted,
        cut=cut,
        unscored=unscored,
        dropped=inputs.dropped,
        left_out=inputs.left_out.any,
    )


def surrogate(*, logp: Tensor, value: Tensor, score_coefficient: Tensor) -> Tensor:
    """`detach(value) + detach(score_coefficient) * (logp - detach(logp))`: a loss with a given value and gradient.

    All tensors are (B, T), `logp` and `value` in nats. The gradient is `score_coefficient * grad logp`: no exp() is in
    the backward pass, so that nothing overflows or cancels (Liu et al., arXiv 2510.01555).

    Example:
        >>> logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> value, coefficient = torch.tensor([[0.5, 0.25]]), torch.tensor([[3.0, -4.0]])
        >>> surrogate(logp=logp, value=value, score_coefficient=coefficient).sum().backward()
        >>> logp.grad
        tensor([[ 3., -4.]])
    """
    return value.detach() + score_coefficient.detach() * (logp - logp.detach())


def assign_credit(x: Tensor, credit: str | None, gamma: float = 1.0) -> Tensor:
    """(B, T) sums of per-token terms `x`, (B, T), over the tokens that each token answers for.

    `"token"`: x_t. `"to_go"`: sum_{s>=t} gamma^(s-t) x_s. `"sequence"`: sum_s x_s, at every t.

    Example:
        >>> assign_credit(torch.tensor([[1.0, 2.0, 4.0]]), "to_go", gamma=0.5)
        tensor([[3., 4., 4.]])
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
    """The `baseline` of `kl_terms`: for each row the mean coefficient of the *other* rows of its group.

    For hosts that split groups over micro-batches or processes: computed once from whole groups (`group_size`
    consecutive rows) and the log-probs at rollout, for `baseline="leave_one_out"` and `"group_mean"` alike. It is
    a function of other samples, so that the expected gradient stays what it was when the policy has moved on (Ahmadian
    et al., arXiv 2402.14740).

    Arguments and errors are those of `kl_terms`. Returns (B, T), detached, in the unit of the coefficient; 0 where no
    other row has something to answer for.

    Example:
        >>> spec = KLSpec.from_name("k1_in_reward", credit="token", baseline="leave_one_out")
        >>> logp, ref_logp = torch.tensor([[-1.0], [-2.0], [-3.0]]), torch.zeros(3, 1)
        >>> leave_one_out_baseline(spec, logp=logp, ref_logp=ref_logp, mask=torch.ones(3, 1), group_size=3).flatten()
        tensor([-2.5000, -2.0000, -1.5000])
    """
    inputs = checked(
        spec,
        logp=logp.detach(),
        ref_logp=ref_logp,
        mask=mask,
        left_out_tokens=left_out_tokens,
        left_out_positions=left_out_positions,
        exact=exact,
    )
    costs = _costs(spec, inputs.logp - inputs.ref_logp, inputs.counted, inputs.left_out, exact)
    return _leave_one_out(spec, costs.credited, inputs.counted, group_size)


@dataclass(frozen=True, kw_only=True)
class _Costs:
    """What the KL of each token costs that token and those before it. All (B, T); detached but for `divergence`."""

    value: Tensor
    """Nats. The KL estimate of the token, 0 where it has none."""
    own: Tensor
    """What the token answers for of its own KL; of an exact one, as a sample of what wasn't summed."""
    to_earlier: Tensor
    """What those before it answer for, as far as it was sampled."""
    divergence: Tensor | None = None
    """Nats, with its graph. The KL that was summed over the vocabulary, for which those before answer as well."""
    credited: Tensor
    """The coefficients of the score, with credit assigned. A masked token can still answer for later ones."""


def _costs(spec: KLSpec, log_ratio: Tensor, counted: Tensor, left_out: LeftOut, exact: ExactKL | None) -> _Costs:
    if exact is None:
        return _sampled_costs(spec, log_ratio, counted, left_out)
    return _exact_costs(spec, exact, log_ratio, counted & ~left_out.any)


def _sampled_costs(spec: KLSpec, log_ratio: Tensor, counted: Tensor, left_out: LeftOut) -> _Costs:
    """Every coefficient is of a sampled token.

    What earlier tokens pay is an unbiased estimate of the divergence at that state: u on the whole vocabulary; where a
    set of tokens is left out, u for the others and 1 - exp(-u) for those, since
    sum_{v kept} (p log(p/r) - p + r) = E[u 1{kept}] + E[(1 - exp(-u)) 1{left out}].
    """
    scored = counted & ~left_out.any
    value = torch.where(scored, _bounded(spec.loss.value(log_ratio)), 0.0)
    own = _bounded(spec.loss.coefficient(log_ratio), spec.coefficient_bound)
    own = torch.where(scored, _summable(own, spec.credit), 0.0)
    if spec.credit == "token":
        return _Costs(value=value, own=own, to_earlier=own, credited=own)
    instead = _summable(_bounded(k3_derivative(log_ratio), spec.left_out_bound), spec.credit)
    to_earlier = torch.where(left_out.by_token, instead, own)
    credited = assign_credit(to_earlier, spec.credit, spec.gamma) + (own - to_earlier)
    return _Costs(value=value, own=own, to_earlier=to_earlier, credited=credited)


def _exact_costs(spec: KLSpec, exact: ExactKL, log_ratio: Tensor, scored: Tensor) -> _Costs:
    """grad E[sum_t KL_t] = E[sum_t (grad KL_t + (sum_{s>t} KL_s) score_t)]: the coefficient is of strictly later KLs.

    The token's own KL in it would not change the expected gradient, E[score] = 0, only the variance. A sampled token
    outside of the head that was summed stands for what wasn't, in its value and in its coefficient.
    """
    divergence = torch.where(scored, exact.value, 0.0)
    tail = scored & exact.outside
    tail_value = torch.where(tail, _summable(spec.loss.value(log_ratio), "to_go"), 0.0)
    own = torch.where(tail, _bounded(spec.loss.coefficient(log_ratio), spec.coefficient_bound), 0.0)
    value = divergence.detach() + tail_value
    return _Costs(
        value=_bounded(value),
        own=own,
        to_earlier=tail_value,
        divergence=divergence,
        credited=_bounded(_of_later(value, spec) + own),
    )


def _of_later(x: Tensor, spec: KLSpec) -> Tensor:
    """(B, T) sum_{s>t} gamma^(s-t) x_s with credit `"to_go"`, 0 with `"token"`."""
    if spec.credit == "token":
        return torch.zeros_like(x)
    to_go = assign_credit(_summable(x, spec.credit), "to_go", spec.gamma)
    return spec.gamma * torch.nn.functional.pad(to_go, (0, 1))[:, 1:]


def _weighted(
    spec: KLSpec, costs: _Costs, weight: Tensor, state_weight: Tensor, coefficient: Tensor, subtracted: Tensor
) -> Tensor:
    """(B, T) w_t (c_t - b_t), where with prefix weights each term of c_t has the weight of the prefix it depends on.

    A sampled cost at s in the coefficient of token t has the ratios up to max(s, t), which is unbiased:
    E_mu[prod_{r<=max(s,t)} rho_r u_s score_t] = E_pi[u_s score_t]. A divergence at s is averaged over the token
    there and has those before s, prod_{r<s} rho_r. The baseline b_t has the token's own.
    """
    if costs.divergence is not None:
        if spec.off_policy != "prefix":
            return weight * _bounded(coefficient - subtracted)
        later = _of_later(state_weight * costs.divergence.detach() + _bounded(weight * costs.to_earlier), spec)
        return later + _bounded(weight * (costs.own - subtracted))
    if spec.off_policy != "prefix" or spec.credit == "token":
        return _bounded(weight * coefficient) - _bounded(weight * subtracted)
    weighted = assign_credit(_summable(weight * costs.to_earlier, spec.credit), "to_go", spec.gamma)
    weighted = weighted + _bounded(weight * (costs.own - costs.to_earlier))
    if spec.credit == "sequence":
        earlier = torch.nn.functional.pad(costs.to_earlier.cumsum(-1), (1, 0))[:, :-1]
        weighted = weighted + _bounded(weight * earlier)
    return weighted - _bounded(weight * subtracted)


def _baseline(spec: KLSpec, credited: Tensor, counted: Tensor, group_size: int | None, given: Tensor | None) -> Tensor:
    """(B, T) the mean of others that is subtracted from the coefficients; `group_share` shrinks what is left."""
    check_baseline(spec, given, counted=counted, group_size=group_size)
    if given is not None:
        return given.detach().to(credited.dtype)
    if spec.baseline is None:
        return torch.zeros_like(credited)
    return _leave_one_out(spec, credited, counted, group_size)


def _leave_one_out(spec: KLSpec, credited: Tensor, counted: Tensor, group_size: int | None) -> Tensor:
    group_size = check_groups(spec.baseline, group_size, rows=len(credited))
    return leave_one_out(credited, assign_credit(counted.to(credited.dtype), spec.credit) > 0, group_size)


def _bounded(x: Tensor, bound: float | None = None) -> Tensor:
    """At most `bound`, None: the largest finite number. An overflow stays what it was, large, with its sign."""
    limit = torch.finfo(x.dtype).max if bound is None else bound
    return x.clamp(-limit, limit)


def _summable(x: Tensor, credit: str | None) -> Tensor:
    """Bounded so that the sums over (B, T) that `credit` takes don't overflow either, and none is inf - inf."""
    return x if credit == "token" else _bounded(x, torch.finfo(x.dtype).max / max(x.size(-1), 1))
