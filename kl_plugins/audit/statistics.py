"""Bias and variance of each term's gradient against the targets, with intervals.

The prompts are held fixed: what is estimated is the gradient on *these* prompts, all noise being that of completions
drawn. A bootstrap resamples each prompt's completions; since whole gradients are resampled, it is done while they are
collected, so that memory doesn't grow with their number. The squared norm of a noisy mean is too large by its noise,
that of a resampled one by twice that: both are subtracted.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from kl_plugins.audit.gradients import TARGETS

JUDGED = ("reverse_kl", "local_reverse_kl")
"""The targets that every row is compared with; the third only serves the terms that promise it."""
LEVEL = 0.95
RESOLVED = 0.5
"""A distance that may be larger than this, and may be 0, has not been measured."""
ROUNDING = 1e-5
"""A norm below this share of the target's is 0: float32's rounding."""

Interval = dict[str, float | None]
"""`value`, `low`, `high`."""


class Resampled:
    """Means of C gradients over prompts, and those of R resamples of each prompt's completions.

    With `prompts_vary` the resampled variances are those of resampled *prompts*: of few draws per prompt (two groups,
    whose squared distances from their mean are equal) no resample of the draws shows how uncertain their variance is.
    """

    def __init__(self, *, resamples: int, seed: int, prompts_vary: bool = False) -> None:
        self.prompts = 0
        self._prompts_vary = prompts_vary
        self._weight = torch.zeros(())
        self._resamples = resamples
        self._generator = torch.Generator().manual_seed(seed)
        self._sums = self._squares = torch.zeros(())

    def plus(self, gradients: Tensor) -> Resampled:
        """With the (C, n, K) of the n >= 2 completions of one more prompt; prompts count alike, whatever their n."""
        count = gradients.size(1)
        drawn = torch.randint(count, (self._resamples, count), generator=self._generator)
        weights = torch.zeros(self._resamples, count).scatter_add_(1, drawn, torch.ones(drawn.shape))
        # A resample of n varies by (n - 1) / n too little.
        weights = torch.cat([torch.ones(1, count), 1 + math.sqrt(count / (count - 1)) * (weights - 1)]).to(gradients)
        more = copy.copy(self)
        more._sums = self._sums + torch.einsum("rn,cnk->rck", weights / count, gradients)
        apart = (gradients - gradients.mean(1, keepdim=True)).square().sum(-1) / (count - 1)
        if self._prompts_vary:
            own = torch.empty(self._resamples).exponential_(generator=self._generator)
            own = torch.cat([torch.ones(1), own]).to(apart)
            more._squares = self._squares + own[:, None] * apart.sum(1)
        else:
            own = torch.ones(1 + self._resamples).to(apart)
            more._squares = self._squares + torch.einsum("rn,cn->rc", weights, apart)
        more._weight = self._weight + own
        more.prompts = self.prompts + 1
        return more

    @property
    def mean(self) -> Tensor:
        """(1 + R, C, K): the means, then the resampled ones."""
        return self._sums / self.prompts

    @property
    def variance(self) -> Tensor:
        """(1 + R, C): total variance of a single completion's gradient, its prompt held fixed."""
        return (self._squares / self._weight[:, None]).double()


def squared_norm(mean: Tensor) -> Tensor:
    """(1 + R,) estimates of the squared norm of what (1 + R, K) means estimate; can be below 0 where that is 0."""
    mean = mean.double()
    noise = (mean[1:] - mean[0]).square().sum(-1).mean()
    subtracted = torch.full((len(mean),), 2.0, dtype=mean.dtype)
    subtracted[0] = 1.0
    return mean.square().sum(-1) - subtracted * noise


def standard_error(mean: Tensor) -> float:
    """The standard error of (1 + R, K) means, as the norm of the vector of errors."""
    return float((mean[1:].double() - mean[0].double()).square().sum(-1).mean().sqrt())


def interval(values: Tensor, level: float = LEVEL) -> Interval:
    """The first of the (1 + R,) values, and percentiles of the others; None where too many are undefined."""
    point, others = float(values[0]), values[1:][values[1:].isfinite()]
    if not math.isfinite(point) or len(others) < level * (len(values) - 1):
        return {"value": point if math.isfinite(point) else None, "low": None, "high": None}
    tail = (1 - level) / 2
    low, high = torch.quantile(others, torch.tensor([tail, 1 - tail], dtype=others.dtype)).tolist()
    return {"value": point, "low": low, "high": high}


def cosine_interval(values: Tensor) -> Interval:
    """As `interval`, but reflected at the estimate and within [-1, 1].

    A ratio of products that fluctuate together is biased by about the square of its noise, and a resample's by twice
    that; the reflection takes it out (the basic bootstrap).
    """
    found = interval(values)
    value, low, high = found["value"], found["low"], found["high"]
    if value is None or low is None or high is None:
        return {"value": None, "low": None, "high": None}
    middle = float(values[1:][values[1:].isfinite()].mean())
    ends = {"value": middle, "low": high, "high": low}
    return {name: max(-1.0, min(1.0, 2 * value - end)) for name, end in ends.items()}


def signed_root(values: Tensor) -> Tensor:
    """sqrt(|x|) with the sign of x: a norm whose square's estimate may be below 0."""
    return values.sign() * values.abs().sqrt()


def target_statistics(targets: Resampled) -> list[dict[str, Any]]:
    """Norm and standard error of each of `TARGETS`."""
    found = []
    for index, name in enumerate(TARGETS):
        mean = targets.mean[:, index]
        norm = interval(signed_root(squared_norm(mean)))
        told = (norm["low"] or 0.0) > 0
        found.append({"name": name, "norm": norm, "standard_error": standard_error(mean), "told_from_zero": told})
    return found


def term_statistics(
    mean: Tensor, variance: Tensor, targets: Resampled, *, gradient_of: str, batch: int
) -> dict[str, Any]:
    """Of one term: its norm, how it compares with the targets, and with what its name promises.

    Args:
        mean: (1 + R, K), the term's mean gradient and its resamples.
        variance: (1 + R,), of one completion's.
        gradient_of: What the name promises, or `""`.
        batch: Completions that the mean squared error is stated for.
    """
    by_name = {name: targets.mean[:, index] for index, name in enumerate(TARGETS)}
    return {
        "norm": interval(signed_root(squared_norm(mean))),
        "deviation": interval(variance.clamp(min=0).sqrt()),
        "against": {name: _against(mean, variance, by_name[name], batch) for name in JUDGED},
        "own_name": _own_name(mean, gradient_of, by_name),
    }


def _against(mean: Tensor, variance: Tensor, target: Tensor, batch: int) -> dict[str, Any]:
    """Cosine; norm, bias, variance and mean squared error relative to the target's (squared) norm."""
    own, scale = squared_norm(mean), positive(squared_norm(target))
    told_from_zero = (interval(own)["low"] or 0.0) > max(0.0, ROUNDING**2 * float(scale[0]))
    bias = squared_norm(mean - target) / scale
    cosine = (mean.double() * target).sum(-1) / (positive(own) * scale).sqrt()
    return {
        "cosine": cosine_interval(cosine if told_from_zero else cosine * torch.nan),
        "norm_ratio": interval(signed_root(own / scale)),
        "bias": interval(signed_root(bias)),
        "variance": interval(variance / scale),
        "mse": interval(bias.clamp(min=0) + variance / batch / scale),
    }


def _own_name(mean: Tensor, gradient_of: str, targets: dict[str, Tensor]) -> dict[str, Any] | None:
    """The distance to the divergence that the name promises, relative to its norm (for `"zero"` to the reverse KL's).

    `seen`: whether the interval leaves 0 out; None if it doesn't and reaches beyond `RESOLVED`, too.
    """
    if gradient_of not in (*targets, "zero"):
        return None
    apart = mean - targets[gradient_of] if gradient_of in targets else mean
    scale = squared_norm(targets[gradient_of if gradient_of in targets else "reverse_kl"])
    bias = interval(signed_root(squared_norm(apart) / positive(scale)))
    low, high = bias["low"], bias["high"]
    seen = None
    if low is not None and high is not None and (low > ROUNDING or high <= RESOLVED):
        seen = low > ROUNDING
    return {"of": gradient_of, "bias": bias, "seen": seen}


def positive(values: Tensor) -> Tensor:
    """NaN where a squared norm isn't above 0: nothing can be divided by it."""
    return torch.where(values > 0, values, torch.nan)


__all__ = [
    "Resampled",
    "interval",
    "positive",
    "signed_root",
    "squared_norm",
    "standard_error",
    "target_statistics",
    "term_statistics",
]
