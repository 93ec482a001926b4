"""The numbers that are logged: sums that ranks and micro-batches can add up, and what they mean.

Names as in the project's contract: `kl/k1`, `kl/k2`, `kl/k3` are plain token means of the three estimates (nats,
detached, unweighted), `kl/loss` is beta times the token mean of the term's value (before the host's own reduction),
`kl/ess` the effective sample size (sum w)^2 / sum w^2 as a share of tokens, `kl/clipped` the share of weights cut,
`kl/unscored` and `kl/dropped` counts of tokens. Where tokens are left out of the KL, those means are over the others,
`kl/left_out` is their share of all tokens and `kl/left_out_k1` their own mean, with 0 for one that the reference could
not score. All are over everything since the last log; `kl/beta` is the coefficient that is in force now (after a
controller's update).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kl_plugins.core.controllers import Controller
from kl_plugins.core.estimators import k1, k2, k3
from kl_plugins.core.terms import KLTerms

SUMS = (
    *("tokens", "k1", "k2", "k3", "loss", "weight", "weight_squared", "cut", "unscored", "dropped", "sequences"),
    *("left_out", "left_out_k1"),
)
# Meaningless where the host's own ratio and clip weigh the coefficients (`clip="combined"`), and logs about them.
WEIGHT_METRICS = ("kl/loss", "kl/ess", "kl/weight_max", "kl/clipped", "kl/unscored")


def kl_sums(terms: KLTerms, *, beta: float | Tensor) -> Tensor:
    """(13,) sums over the counted tokens, in the order of `SUMS`; add them over ranks and micro-batches.

    Args:
        terms: `kl_terms` of a micro-batch.
        beta: What the term is multiplied with in the loss, a number or (B, 1); in `loss` only.
    """
    weight, kept = terms.weight, terms.mask & ~terms.left_out
    u = torch.where(kept, terms.log_ratio, 0.0)
    sums = (kept, k1(u), k2(u), k3(u), beta * terms.value, weight, weight.square(), terms.cut, terms.unscored)
    # A masked position holds log_ratio 0 and weight 0, so every sum is over counted tokens already.
    more = (terms.dropped, kept.any(-1), terms.left_out, terms.log_ratio - u)
    return torch.stack([x.sum(dtype=u.dtype) for x in (*sums, *more)])


def next_beta(controller: Controller, sums: Tensor) -> float:
    """The beta after an update of `controller` on (13,) `kl_sums` of all ranks: it holds the plain mean of k1.

    Raises `ValueError` for sums that aren't finite, unless the controller has no target.
    """
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    return controller.update(kl_sum=total["k1"], tokens=total["tokens"], sequences=total["sequences"])


def kl_metrics(sums: Tensor, *, weight_max: Tensor, beta: float, leaves_out: bool = False) -> dict[str, float]:
    """The logged numbers, as Python floats (one device sync). A batch without a counted token gives zeros.

    Args:
        sums: (13,), `kl_sums` of all micro-batches and ranks.
        weight_max: One number, the largest weight of all.
        beta: The one in force now.
        leaves_out: Tokens may be left out in this run, so that `kl/left_out` is logged also where it is 0.
    """
    *values, largest = torch.cat([sums, weight_max.reshape(1).to(sums.dtype)]).tolist()
    total = dict(zip(SUMS, values, strict=True))
    tokens = max(total["tokens"], 1.0)
    weighed = max(total["tokens"] + total["left_out"], 1.0)
    squares = total["weight_squared"]
    metrics = {
        "kl/k1": total["k1"] / tokens,
        "kl/k2": total["k2"] / tokens,
        "kl/k3": total["k3"] / tokens,
        "kl/loss": total["loss"] / tokens,
        "kl/ess": total["weight"] ** 2 / squares / weighed if squares else 0.0,
        "kl/weight_max": largest,
        "kl/clipped": total["cut"] / weighed,
        "kl/unscored": total["unscored"],
        "kl/dropped": total["dropped"],
        "kl/beta": beta,
    }
    if leaves_out or total["left_out"]:
        metrics["kl/left_out"] = total["left_out"] / weighed
    if total["left_out"]:
        metrics["kl/left_out_k1"] = total["left_out_k1"] / total["left_out"]
    return metrics
