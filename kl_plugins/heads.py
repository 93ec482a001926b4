"""Exact KLs from hidden states and LM heads: no (B, T, V) tensor is ever made.

`head_kl` computes tiles of both models' logits, folds each into what the divergence needs, and computes them anew for
the gradient. What it keeps between the passes are six numbers a row; what it needs besides are a few tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kl_plugins.errors import ConfigError
from kl_plugins.exact import ExactKL
from kl_plugins.spec import KLSpec

# Of a tile of logits: a few of them stay in a CPU's cache. Elsewhere a tile is WIDER times as long and as wide.
ROWS = 512
COLUMNS = 512
WIDER = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """How a model makes logits z of its last hidden state h: y = scale (h W' + b), z = softcap tanh(y / softcap) / T.

    Without `softcap`, z = y / T.
    """

    weight: Tensor
    """(V, H)."""
    bias: Tensor | None = None
    """(V,)."""
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32
    """What hidden state and weight are rounded to before they are multiplied. Sums are in float32 at least."""

    def tile(self, hidden: Tensor, columns: slice) -> tuple[Tensor, Tensor | None]:
        """(n, c) logits of some tokens, and tanh(y / softcap) if there is a softcap."""
        y = _product(hidden.to(self.dtype), self.weight[columns].to(self.dtype).t())
        if self.bias is not None:
            y += self.bias[columns].to(y.dtype)
        if self.softcap is None:
            by = self.scale / self.temperature
            return y if by == 1 else y.mul_(by), None
        tanh = y.mul_(self.scale / self.softcap).tanh_()
        return tanh * (self.softcap / self.temperature), tanh


def head_kl(spec: KLSpec, *, hidden: Tensor, head: Head, ref_hidden: Tensor, ref_head: Head, mask: Tensor) -> ExactKL:
    """As `exact_kl`, from what logits are made of.

    Args:
        spec: An exact configuration without `top_k`.
        hidden: (B, T, H), the current policy's last hidden states, with their graph: the gradient flows into them and
            into the policy's `head`.
        ref_hidden: (B, T, H'), the reference's. No gradient.
        mask: (B, T) of 0 and 1. Masked positions contribute exactly nothing, whatever they hold.

    Raises:
        `ConfigError`: a configuration that isn't exact or has `top_k`, or models whose vocabularies differ in size.
    """
    if not spec.loss.exact or spec.top_k is not None:
        raise ConfigError(f"head_kl sums over the whole vocabulary, {spec.name} with top_k={spec.top_k} doesn't")
    if len(head.weight) != len(ref_head.weight):
        sizes = f"{len(head.weight)} tokens, the reference's {len(ref_head.weight)}"
        raise ConfigError(f"the policy's vocabulary has {sizes}: an exact KL needs the same one")
    counted = mask.bool()
    summed = _HeadKL.apply(  # type: ignore[no-untyped-call]
        hidden[counted], head.weight, head.bias, ref_hidden.detach()[counted], head, ref_head, spec.loss.exact
    )
    value = summed.new_zeros(counted.shape).masked_scatter(counted, summed)
    return ExactKL(value=value, outside=torch.zeros_like(counted), of=spec.loss.exact, tail=spec.tail)


class _HeadKL(torch.autograd.Function):
    """(N,) divergences of rows, differentiable in the policy's hidden states, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        head: Head,
        ref_head: Head,
        of: str,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            statistics = [
                _statistics(hidden[rows], ref_hidden[rows], head, ref_head, of)
                for rows in _slices(len(hidden), ROWS, hidden.device)
            ]
        dtype = torch.promote_types(head.dtype, torch.float32)
        folded = torch.cat(statistics) if statistics else torch.zeros(0, 4, dtype=dtype, device=hidden.device)
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, folded)
        ctx.heads, ctx.of = (head, ref_head), of
        return folded[:, 0].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> Any:
        hidden, weight, bias, ref_hidden, folded = ctx.saved_tensors
        head, ref_head = ctx.heads
        above = torch.where(folded[:, 0].isfinite(), above, 0.0)
        to_hidden, to_weight, to_bias = (
            torch.zeros(x.shape, dtype=folded.dtype, device=x.device) if needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(len(hidden), ROWS, hidden.device):
                for columns in _slices(len(weight), COLUMNS, hidden.device):
                    at = hidden[rows], ref_hidden[rows], head, ref_head, columns
                    gradient = _gradient(*at, folded[rows], above[rows], ctx.of)
                    narrow = gradient.to(head.dtype)
                    if to_hidden is not None:
                        to_hidden[rows] += _product(narrow, weight[columns].to(head.dtype))
                    if to_weight is not None:
                        to_weight[columns] += _product(narrow.t(), hidden[rows].to(head.dtype))
                    if to_bias is not None:
                        to_bias[columns] += gradient.sum(0)
        returned = (
            None if found is None else found.to(x.dtype)
            for found, x in zip((to_hidden, to_weight, to_bias), (hidden, weight, bias), strict=True)
        )
        return *returned, None, None, None, None


def _statistics(hidden: Tensor, ref_hidden: Tensor, head: Head, ref_head: Head, of: str) -> Tensor:
    """(n, 4): the divergence, both models' log of sum exp(z), and the difference of those two.

    The difference is folded by itself: of two sums near 30, float32 leaves too little of a small divergence.
    """
    folded = _fold(hidden, ref_hidden, head, ref_head, of, careful=False)
    unclear = folded[:, 0].isnan()  # a token that a model excludes: 0 * -inf
    if unclear.any():
        folded[unclear] = _fold(hidden[unclear], ref_hidden[unclear], head, ref_head, of, careful=True)
    return folded


def _fold(hidden: Tensor, ref_hidden: Tensor, head: Head, ref_head: Head, of: str, *, careful: bool) -> Tensor:
    """`_statistics`; only if it is `careful` are tokens of probability 0 left out whatever their log-ratio."""
    dtype = torch.promote_types(head.dtype, torch.float32)
    gap = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
    sums, tops = [gap, gap], [torch.full_like(gap, torch.finfo(dtype).min)] * 2
    for columns in _slices(len(head.weight), COLUMNS, hidden.device):
        z, ref_z = head.tile(hidden, columns)[0], ref_head.tile(ref_hidden, columns)[0].to(dtype)
        before = tops
        tops = [torch.maximum(top, x.amax(-1)) for top, x in zip(before, (z, ref_z), strict=True)]
        shrink = [(old - new).exp() for old, new in zip(before, tops, strict=True)]
        mass, ref_mass = ((x - top[:, None]).exp_() for x, top in zip((z, ref_z), tops, strict=True))
        sums = [s * by + x.sum(-1) for s, by, x in zip(sums, shrink, (mass, ref_mass), strict=True)]
        average, by = (mass, shrink[0]) if of == "reverse_kl" else (ref_mass, shrink[1])
        u = z.sub_(ref_z)
        gap = torch.where(by > 0, gap * by, 0.0) + torch.linalg.vecdot(
            average, u.masked_fill_(average == 0, 0) if careful else u
        )
    difference = (tops[0] - tops[1]) + (sums[0] / sums[1]).log()
    log_sums = [top + s.log() for top, s in zip(tops, sums, strict=True)]
    value = gap / sums[0] - difference if of == "reverse_kl" else difference - gap / sums[1]
    return torch.stack([value, *log_sums, difference], dim=-1)


def _gradient(
    hidden: Tensor,
    ref_hidden: Tensor,
    head: Head,
    ref_head: Head,
    columns: slice,
    folded: Tensor,
    above: Tensor,
    of: str,
) -> Tensor:
    """(n, c) gradient of `above * divergence` with respect to the policy's h W' + b. 0 where it isn't defined."""
    value, log_sum, ref_log_sum, difference = folded[..., None].unbind(1)
    z, tanh = head.tile(hidden, columns)
    ref_z = ref_head.tile(ref_hidden, columns)[0].to(z.dtype)
    p = (z - log_sum).exp_()
    if of == "reverse_kl":
        gradient = z.sub_(ref_z).sub_(difference + value).mul_(p)
    else:
        gradient = p.sub_(ref_z.sub_(ref_log_sum).exp_())
    gradient *= above[:, None] * (head.scale / head.temperature)
    if tanh is not None:
        gradient *= 1 - tanh.square()
    return gradient.nan_to_num_(nan=0, posinf=0, neginf=0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices of one dtype, summed and returned in float32 at least."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _slices(length: int, size: int, device: torch.device) -> list[slice]:
    size = size if device.type == "cpu" else WIDER * size
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
