"""Exact KLs from hidden states and LM heads: no (B, T, V) tensor is ever made.

`fused_linear_kl` computes tiles of both models' logits, folds each into what the divergence needs, and computes them
anew for the gradient. What it keeps between the passes are six numbers a row; what it needs besides are a few tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kl_plugins.core.exact import ExactKL
from kl_plugins.core.spec import KLSpec
from kl_plugins.errors import ConfigError

# Of a tile of logits: a few of them stay in a CPU's cache. Elsewhere a tile is WIDER times as long and as wide.
ROWS = 512
COLUMNS = 512
WIDER = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class LMHead:
    """How a model makes logits z of its last hidden state h: y = scale (h W' + b), z = softcap tanh(y / softcap) / T.

    Without `softcap`, z = y / T.
    """

    weight: Tensor
    """(V, H), W."""
    bias: Tensor | None = None
    """(V,), b."""
    scale: float = 1.0
    """What y is multiplied with, 1 for most models."""
    softcap: float | None = None
    """Bound that tanh brings logits within. None: none."""
    temperature: float = 1.0
    """T, of the distribution that is scored."""
    dtype: torch.dtype = torch.float32
    """What hidden state and weight are rounded to before they are multiplied. Sums are in float32 at least."""

    def tile(self, hidden: Tensor, columns: slice) -> tuple[Tensor, Tensor | None]:
        """(n, c) logits of the vocabulary's `columns` for (n, H) `hidden`, and tanh(y / softcap) with a softcap."""
        y = _product(hidden.to(self.dtype), self.weight[columns].to(self.dtype).t())
        if self.bias is not None:
            y += self.bias[columns].to(y.dtype)
        if self.softcap is None:
            by = self.scale / self.temperature
            return y if by == 1 else y.mul_(by), None
        tanh = y.mul_(self.scale / self.softcap).tanh_()
        return tanh * (self.softcap / self.temperature), tanh


def fused_linear_kl(
    spec: KLSpec, *, hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead, mask: Tensor
) -> ExactKL:
    """`exact_kl` of the logits that hidden states and LM heads make, without making them all at once.

    Values and gradients are those of `exact_kl`; a row whose divergence isn't finite has gradient 0.

    Args:
        spec: An exact configuration without `top_k`.
        hidden: (B, T, H), the current policy's last hidden states, with their graph: the gradient flows into them and
            into the policy's `head`.
        head: The policy's LM head.
        ref_hidden: (B, T, H'), the reference's. No gradient.
        ref_head: The reference's, of the same vocabulary.
        mask: (B, T) of 0 and 1. Masked positions contribute exactly nothing, whatever they hold.

    Raises:
        ConfigError: a configuration that isn't exact or has `top_k`, or models whose vocabularies differ in size.

    Returns:
        `ExactKL`, nats, in float32 at least.

    Example:
        >>> spec = KLSpec.from_name("exact_as_loss")
        >>> hidden, mask = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[1, 1]])
        >>> head, ref_head = (LMHead(weight=torch.tensor([[w], [0.0], [0.0]])) for w in (1.0, 0.0))
        >>> kl = fused_linear_kl(spec, hidden=hidden, head=head, ref_hidden=hidden, ref_head=ref_head, mask=mask)
        >>> kl.value
        tensor([[0.1233, 0.4330]])
    """
    if not spec.loss.exact or spec.top_k is not None:
        raise ConfigError(
            f"fused_linear_kl sums over the whole vocabulary, {spec.name} with top_k={spec.top_k} doesn't"
        )
    _check_vocabularies(head, ref_head)
    counted = mask.bool()
    summed, _, _ = _Head.apply(  # type: ignore[no-untyped-call]
        hidden[counted], head.weight, head.bias, ref_hidden.detach()[counted], None, head, ref_head, spec.loss.exact
    )
    value = summed.new_zeros(counted.shape).masked_scatter(counted, summed)
    return ExactKL(value=value, outside=torch.zeros_like(counted), of=spec.loss.exact, tail=spec.tail)


def fused_linear_kl_and_logps(
    of: str, *, hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) divergences of rows, log-probs of their `targets` and entropies, all three in one pass over the tiles.

    All are in nats and differentiable in `hidden` and the policy's `head`. The policy's logits are made once for the
    three of them, and so is their gradient: of the six products of matrices that a step takes, scoring the targets
    alone would take four.

    Args:
        of: `"reverse_kl"` or `"forward_kl"`.
        hidden: (N, H), the policy's last hidden states of N tokens, with their graph.
        head: The policy's LM head.
        ref_hidden: (N, H'), the reference's. No gradient.
        ref_head: The reference's, of the same vocabulary.
        targets: (N,) int64, the tokens to score.

    Raises:
        ConfigError: models whose vocabularies differ in size.
    """
    _check_vocabularies(head, ref_head)
    arguments = hidden, head.weight, head.bias, ref_hidden.detach(), targets, head, ref_head, of
    return _Head.apply(*arguments)  # type: ignore[no-untyped-call, no-any-return]


def _check_vocabularies(head: LMHead, ref_head: LMHead) -> None:
    if len(head.weight) != len(ref_head.weight):
        sizes = f"{len(head.weight)} tokens, the reference's {len(ref_head.weight)}"
        raise ConfigError(f"the policy's vocabulary has {sizes}: an exact KL needs the same one")


class _Head(torch.autograd.Function):
    """(N,) divergences of rows; with `targets` also their log-probs and the policy's entropies, else None.

    Differentiable in the policy's hidden states, weight and bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        targets: Tensor | None,
        head: LMHead,
        ref_head: LMHead,
        of: str,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden.device.type, enabled=False):
            found = []
            for rows in _row_tiles(hidden):
                here = None if targets is None else targets[rows]
                found.append(_statistics(hidden[rows], ref_hidden[rows], here, head, ref_head, of))
        dtype = torch.promote_types(head.dtype, torch.float32)
        folded = (
            torch.cat([rows for rows, _ in found]) if found else torch.zeros(0, 6, dtype=dtype, device=hidden.device)
        )
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, targets, folded)
        ctx.clean = all(clean for _, clean in found)
        ctx.heads, ctx.of = (head, ref_head), of
        value, logp, entropy = folded[:, :3].t().contiguous().unbind()
        return (value, None, None) if targets is None else (value, logp, entropy)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *above: Tensor | None) -> Any:
        hidden, weight, bias, ref_hidden, targets, folded = ctx.saved_tensors
        head, ref_head = ctx.heads
        zeros = folded.new_zeros(len(folded))
        to_value, to_logp, to_entropy = (zeros if x is None else x.to(folded.dtype) for x in above)
        to_value = torch.where(folded[:, 0].isfinite(), to_value, 0.0)
        weights = torch.stack([to_value, to_logp, to_entropy], dim=-1).mul_(head.scale / head.temperature)
        to_hidden, to_weight, to_bias = (
            torch.zeros(x.shape, dtype=folded.dtype, device=x.device) if needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _row_tiles(hidden):
                here = None if targets is None else targets[rows]
                for columns in _column_tiles(hidden[rows], weight):
                    at = hidden[rows], ref_hidden[rows], here, head, ref_head, columns
                    gradient = _gradient(
                        *at, folded[rows], weights[rows], ctx.of, entropy=above[2] is not None, clean=ctx.clean
                    )
                    narrow = gradient.to(head.dtype)
                    if to_hidden is not None:
                        _add_product(to_hidden[rows], narrow, weight[columns].to(head.dtype))
                    if to_weight is not None:
                        _add_product(to_weight[columns], narrow.t(), hidden[rows].to(head.dtype))
                    if to_bias is not None:
                        to_bias[columns] += gradient.sum(0)
        returned = (
            None if found is None else found.to(x.dtype)
            for found, x in zip((to_hidden, to_weight, to_bias), (hidden, weight, bias), strict=True)
        )
        return *returned, None, None, None, None, None


def _statistics(
    hidden: Tensor, ref_hidden: Tensor, targets: Tensor | None, head: LMHead, ref_head: LMHead, of: str
) -> tuple[Tensor, bool]:
    """(n, 6) and whether they are finite as they stand, which a token that a model excludes prevents.

    The divergence, the log-prob of the target, the entropy, both models' log of sum exp(z), and the difference of
    those two. Without `targets` the second and the third are 0.

    The difference is folded by itself: of two sums near 30, float32 leaves too little of a small divergence.
    """
    folded = _fold(hidden, ref_hidden, targets, head, ref_head, of, careful=False)
    clean = bool(folded[:, 0].isfinite().all())
    if not clean:
        unclear = ~folded[:, 0].isfinite()  # 0 * -inf, if it isn't inf itself
        targets = None if targets is None else targets[unclear]
        folded[unclear] = _fold(hidden[unclear], ref_hidden[unclear], targets, head, ref_head, of, careful=True)
    return folded, clean


def _fold(
    hidden: Tensor,
    ref_hidden: Tensor,
    targets: Tensor | None,
    head: LMHead,
    ref_head: LMHead,
    of: str,
    *,
    careful: bool,
) -> Tensor:
    """`_statistics`; only if it is `careful` are tokens of probability 0 left out whatever their log-ratio."""
    dtype = torch.promote_types(head.dtype, torch.float32)
    gap = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
    weighted, target = gap, torch.zeros_like(gap)
    sums, tops = [gap, gap], [torch.full_like(gap, torch.finfo(dtype).min)] * 2
    for columns in _column_tiles(hidden, head.weight):
        z, ref_z = head.tile(hidden, columns)[0], ref_head.tile(ref_hidden, columns)[0].to(dtype)
        before = tops
        tops = [torch.maximum(top, x.amax(-1)) for top, x in zip(before, (z, ref_z), strict=True)]
        shrink = [(old - new).exp() for old, new in zip(before, tops, strict=True)]
        mass, ref_mass = ((x - top[:, None]).exp_() for x, top in zip((z, ref_z), tops, strict=True))
        sums = [s * by + x.sum(-1) for s, by, x in zip(sums, shrink, (mass, ref_mass), strict=True)]
        if targets is not None:
            at, here = _within(targets, columns)
            target = torch.where(here, z.gather(-1, at[:, None]).squeeze(-1), target)
            likely = z.masked_fill(mass == 0, 0) if careful else z
            weighted = weighted * shrink[0] + torch.linalg.vecdot(mass, likely)
        average, by = (mass, shrink[0]) if of == "reverse_kl" else (ref_mass, shrink[1])
        u = z.sub_(ref_z)
        gap = torch.where(by > 0, gap * by, 0.0) + torch.linalg.vecdot(
            average, u.masked_fill_(average == 0, 0) if careful else u
        )
    difference = (tops[0] - tops[1]) + (sums[0] / sums[1]).log()
    log_sums = [top + s.log() for top, s in zip(tops, sums, strict=True)]
    value = gap / sums[0] - difference if of == "reverse_kl" else difference - gap / sums[1]
    scores = (target - log_sums[0], log_sums[0] - weighted / sums[0]) if targets is not None else (target, target)
    return torch.stack([value, *scores, *log_sums, difference], dim=-1)


def _gradient(
    hidden: Tensor,
    ref_hidden: Tensor,
    targets: Tensor | None,
    head: LMHead,
    ref_head: LMHead,
    columns: slice,
    folded: Tensor,
    weights: Tensor,
    of: str,
    *,
    entropy: bool,
    clean: bool,
) -> Tensor:
    """(n, c) gradient of `weights` times divergence, log-prob and entropy with respect to the policy's h W' + b.

    With p, r the probabilities and u = log p - log r, they are p (u - KL) or p - r; 1{v = target} - p; and
    -p (log p + entropy). `entropy`: whether its weights are other than 0. `clean`: no model excludes a token.
    """
    value, _, entropies, log_sum, ref_log_sum, difference = folded[..., None].unbind(1)
    by_kl, by_logp, by_entropy = weights[..., None].unbind(1)
    z, tanh = head.tile(hidden, columns)
    ref_z = ref_head.tile(ref_hidden, columns)[0].to(z.dtype)
    p = (z - log_sum).exp_()
    constant = -by_logp
    surprise = (z - (log_sum - entropies)).mul_(by_entropy) if entropy else None
    if of == "reverse_kl":
        constant = constant - torch.where(by_kl == 0, 0.0, by_kl * (difference + value))
        gradient = z.sub_(ref_z).mul_(by_kl)
        gradient = (gradient if clean else _defined(gradient)).add_(constant).mul_(p)
    else:
        paid = ref_z.sub_(ref_log_sum).exp_().mul_(by_kl)
        gradient = (p * (by_kl - by_logp)).sub_(paid if clean else _defined(paid))
    if surprise is not None:
        gradient -= (surprise if clean else _defined(surprise)).mul_(p)
    if targets is not None:
        at, here = _within(targets, columns)
        gradient.scatter_add_(-1, at[:, None], torch.where(here[:, None], by_logp, 0.0))
    elif not clean:
        gradient = _defined(gradient)
    if tanh is not None:
        gradient *= 1 - tanh.square()
    return gradient


def _within(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """(n,) each: where a tile has a row's target, junk if nowhere; and whether it has it."""
    here = (targets >= columns.start) & (targets < columns.stop)
    return torch.where(here, targets - columns.start, 0), here


def _defined(x: Tensor) -> Tensor:
    return x.nan_to_num_(nan=0, posinf=0, neginf=0)


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """to += a @ b, without a copy of the product where their dtypes allow it."""
    if a.dtype == to.dtype:
        to.addmm_(a, b)
    else:
        to += _product(a, b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices of one dtype, summed and returned in float32 at least."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _row_tiles(hidden: Tensor) -> list[slice]:
    return _slices(len(hidden), ROWS * _wider(hidden))


def _column_tiles(hidden: Tensor, weight: Tensor) -> list[slice]:
    """For the rows of a tile: of fewer it has more columns."""
    wider = _wider(hidden)
    return _slices(len(weight), COLUMNS * wider * max(1, ROWS * wider // max(1, len(hidden))))


def _wider(hidden: Tensor) -> int:
    return 1 if hidden.device.type == "cpu" else WIDER


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
