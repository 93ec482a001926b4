"""KLs that are summed over the vocabulary instead of sampled from it (Rao-Blackwellized).

Given the state, a sampled token says nothing about KL(pi(.|s_t) || ref(.|s_t)) that the two next-token distributions
don't: `exact_kl` sums it, and `kl_plugins.kl_terms` makes of it a local or a sequence gradient. With p = softmax(z),
r the reference's probabilities and u = log p - log r,

    reverse: KL = sum_v p_v u_v      d KL / d z_v = p_v (u_v - KL)
    forward: KL = -sum_v r_v u_v     d KL / d z_v = p_v - r_v

(Amini et al., arXiv 2504.10637). No exp() of a log-ratio is in either gradient: nothing overflows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kl_plugins.errors import ConfigError

if TYPE_CHECKING:
    from kl_plugins.core.spec import KLSpec


@dataclass(frozen=True, kw_only=True)
class ExactKL:
    """What `kl_plugins.kl_terms` needs of the full next-token distributions."""

    value: Tensor
    """(B, T), nats, with its graph: the divergence of each position, of its head with `tail="sampled"`. 0 where the
    mask is."""
    outside: Tensor
    """(B, T) bool. The sampled token is none of those summed, so that its own coefficient stands for the tail."""
    of: str
    """`"reverse_kl"` or `"forward_kl"`."""
    top_k: int | None = None
    """How many tokens of the vocabulary were summed, `KLSpec.top_k`. None: all."""
    tail: str = "sampled"
    """What became of the others, `KLSpec.tail`."""

    def check(self, spec: KLSpec) -> None:
        """Raise `ConfigError` if it was made for another configuration."""
        made = {"of": self.of, "top_k": self.top_k, "tail": self.tail}
        wanted = {"of": spec.loss.exact, "top_k": spec.top_k, "tail": spec.tail}
        if made != wanted:
            raise ConfigError(f"{spec.name} needs an exact KL with {wanted}, was given one with {made}: make it anew")


def exact_kl(
    spec: KLSpec, *, logits: Tensor, ref_logits: Tensor, mask: Tensor, tokens: Tensor | None = None
) -> ExactKL:
    """The divergence of every position, summed over the vocabulary of V tokens or over its head.

    Its gradient with respect to the logits is analytic (Amini et al., arXiv 2504.10637; the formulas stand at the top
    of this module): that of the divergence itself, for a distribution of prefixes that is held fixed.

    Args:
        spec: A configuration whose `loss.exact` is set; its `top_k` and `tail` are read. The head is the `top_k`
            likeliest tokens of the current policy.
        logits: (B, T, V), the current policy's, with their graph. Half precision is cast to float32.
        ref_logits: (B, T, V), the reference's. A token that it excludes (-inf) but the policy doesn't makes the KL
            inf, which `KLSpec.nonfinite` decides about; one that both exclude contributes nothing.
        mask: (B, T) of 0 and 1. Masked positions contribute exactly nothing, whatever they hold.
        tokens: (B, T) int64, the sampled tokens; needed with `top_k` and `tail="sampled"`.

    Raises:
        ConfigError: a configuration that isn't exact, or `tokens` missing.
        ValueError: shapes that don't agree.

    Returns:
        `ExactKL`, to be passed to `kl_plugins.kl_terms` as `exact`.

    Example:
        >>> from kl_plugins import KLSpec
        >>> logits = torch.tensor([[[2.0, 0.0, -1.0]]], requires_grad=True)
        >>> spec = KLSpec.from_name("exact_as_loss")
        >>> kl = exact_kl(spec, logits=logits, ref_logits=torch.zeros(1, 1, 3), mask=torch.ones(1, 1))
        >>> round(kl.value.item(), 4)
        0.5743
    """
    if not spec.loss.exact:
        raise ConfigError(
            f"exact_kl was asked for {spec.name}, which is sampled: use exact_in_reward or exact_as_loss"
        )
    if logits.shape != ref_logits.shape or logits.shape[:-1] != mask.shape or mask.dim() != 2:
        found = f"logits {tuple(logits.shape)}, ref_logits {tuple(ref_logits.shape)}, mask {tuple(mask.shape)}"
        raise ValueError(f"exact_kl needs (B, T, V) logits of both models and a (B, T) mask, found {found}")
    counted = mask.bool()
    outside = torch.zeros_like(counted)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows, ref_rows = logits[counted].to(dtype), ref_logits.detach()[counted].to(dtype)
    head = None
    if spec.top_k is not None:
        likeliest = rows.detach().topk(min(spec.top_k, rows.size(-1)), dim=-1).indices
        head = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, likeliest, True)
        if spec.tail == "sampled":
            if tokens is None:
                raise ConfigError(f"top_k={spec.top_k} with tail='sampled' needs the sampled tokens: pass tokens")
            outside[counted] = ~head.gather(-1, tokens[counted][:, None]).squeeze(-1)
    arguments = rows, ref_rows, head, spec.loss.exact, spec.tail == "bucket"
    summed = _Divergence.apply(*arguments)  # type: ignore[no-untyped-call]
    value = summed.new_zeros(counted.shape).masked_scatter(counted, summed)
    return ExactKL(value=value, outside=outside, of=spec.loss.exact, top_k=spec.top_k, tail=spec.tail)


def divergence(
    logits: Tensor, ref_logits: Tensor, *, of: str, head: Tensor | None = None, bucket: bool = False
) -> tuple[Tensor, Tensor]:
    """(N,) divergences in nats and their (N, V) gradient with respect to `logits`, both (N, V).

    Args:
        of: `"reverse_kl"` KL(p || r), or `"forward_kl"` KL(r || p).
        head: (N, V) bool, the tokens that are summed; None: all. The gradient doesn't pass through the choice.
        bucket: What isn't in the head counts as one token (a lower bound, with the gradient of that bound) instead of
            not at all.

    A row whose divergence isn't finite has gradient 0.
    """
    log_p, log_r = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    p, r = log_p.exp(), log_r.exp()
    reverse = of == "reverse_kl"
    average = p if reverse else r
    u = torch.where(average > 0, log_p - log_r, 0.0)
    paid = r
    if head is not None and bucket:
        p_rest, r_rest = (x.masked_fill(head, 0).sum(-1, keepdim=True) for x in (p, r))
        rest = p_rest if reverse else r_rest
        u = torch.where(head, u, torch.where(rest > 0, p_rest.log() - r_rest.log(), 0.0))
        paid = torch.where(head, r, torch.where(p_rest > 0, p * (r_rest / p_rest), 0.0))
    elif head is not None:
        paid = r.masked_fill(~head, 0)
        average = average.masked_fill(~head, 0)
    value = (average * u).sum(-1) if reverse else -(average * u).sum(-1)
    if reverse:
        by_token = u if head is None or bucket else (u + 1).masked_fill(~head, 0)
        gradient = p * (by_token - (p * by_token).sum(-1, keepdim=True))
    else:
        gradient = p * paid.sum(-1, keepdim=True) - paid
    return value, torch.where(value.isfinite()[:, None], gradient, 0.0)


class _Divergence(torch.autograd.Function):
    """`divergence`, differentiable in the policy's logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor, head: Tensor | None, of: str, bucket: bool) -> Tensor:
        value, gradient = divergence(logits, ref_logits, of=of, head=head, bucket=bucket)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return above[:, None] * gradient, None, None, None, None
