"""What a run's log-probs say about its KL: sums that micro-batches and ranks can add up, and the numbers they mean.

Host-agnostic: tensors in, one flat float64 tensor of sums out (`monitor_sums`, no device sync), which is merged
(`merged`) and read (`monitor_metrics`, one sync). u = log pi(y_t) - log ref(y_t) as everywhere in `kl_plugins`;
all numbers are detached and unweighted, in nats, and over everything since the last log.

Standard errors. The tokens of a completion are dependent, so the completion is the unit that was drawn. With S_i the
sum of x over the n_i counted tokens of completion i, G completions that have any, and N = sum_i n_i, a token mean is
the ratio estimate m = sum_i S_i / N, and

    se(m)^2 = G / (G - 1) * sum_i (S_i - m n_i)^2 / N^2

(cluster-robust, by linearization of the ratio; Cochran, "Sampling Techniques", 1977, section 6.4). With n_i = 1, as
for the sequence KL, it is the usual standard error of a mean. It is the error given the prompts and the policy: it
doesn't know what completions of one prompt have in common, and takes a completion that was trained on twice for two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kl_plugins.core.estimators import k1, k2, k3

POSITION_EDGES = (1, 4, 16, 64, 256, 1024, 4096)
"""Where a bin of positions ends and the next begins: the first token, then each bin ends 4 times further out."""
POSITIONS = ("0", "1-3", "4-15", "16-63", "64-255", "256-1023", "1024-4095", "4096-up")
CLASSES = ("text", "eos", "special")
"""Token classes, as `monitor_sums` numbers them."""

# Means with a standard error: six sums each.
MEANS = ("k1", "k2", "k3", "sequence", *(f"position/{p}" for p in POSITIONS), *(f"class/{c}" for c in CLASSES))
MOMENTS = ("total", "tokens", "total_squared", "total_times_tokens", "tokens_squared", "clusters")
SUMS = (
    *("compared", "finite", "k2_above_10", "k3_above_10", "with_coefficient", "dead"),
    *("weighed", "ratio", "ratio_squared", "ratio_above_2", "ratio_above_10", "ratio_below_0.1", "ratio_unscored"),
    *("engine_scored", "engine_gap", "engine_k1", "engine_unscored"),
    *("gradient_kl", "gradient_rest"),
)
MAXIMA = ("ratio_max", "engine_gap_max")
SIZE = len(MEANS) * len(MOMENTS) + len(SUMS) + len(MAXIMA)

# exp saturates here, so that the square of an overflow, summed over any batch, is still a number.
_LARGEST_EXPONENT = 300.0
# Below it, u is the rounding of two float32 log-probs, and a coefficient that rounds to 0 is nothing lost.
_ROUNDING = 1e-6


def monitor_sums(
    *,
    logp: Tensor,
    mask: Tensor,
    ref_logp: Tensor | None = None,
    old_logp: Tensor | None = None,
    engine_logp: Tensor | None = None,
    classes: Tensor | None = None,
    coefficient: Tensor | None = None,
    gradient: Tensor | None = None,
    left_out: Tensor | None = None,
) -> Tensor:
    """`(SIZE,)` float64 sums and maxima of a micro-batch, on its device.

    Args:
        logp: (B, T). The current policy's. Column t is token t of the completion (padding is on the right).
        mask: (B, T). 1 counts a token. What stands at the others, NaN included, doesn't matter.
        ref_logp: (B, T). The reference's. A counted token whose `u` is not finite is counted as such and left out of
            every mean; its completion is left out of the sequence KL.
        old_logp: (B, T). The trainer's policy when the completions were drawn; None: it was the current one.
        engine_logp: (B, T). What the rollout engine reported; not finite where it scored nothing. Importance weights
            are against it, else against `old_logp`; without both there are none.
        classes: (B, T). Indices into `CLASSES`.
        coefficient: (B, T). d(the host's own KL term) / d logp, up to a positive factor, as the host's floats have it.
        left_out: (B, T) bool. Tokens without a KL of their own: they are in no mean of the KL, nor dead.
        gradient: (2,). Squared gradient norms (`squared_gradient_norms`).

    Log-probs are in nats. `SIZE` counts the sums behind every mean, the plain sums and the maxima.

    Example:
        >>> logp, ref_logp = torch.tensor([[-1.0, -2.0], [-1.0, 0.0]]), torch.tensor([[-1.5, -1.5], [-2.0, 0.0]])
        >>> sums = monitor_sums(logp=logp, mask=torch.tensor([[1, 1], [1, 0]]), ref_logp=ref_logp)
        >>> {name: round(x, 3) for name, x in monitor_metrics(sums).items() if name in ("kl/k1", "kl/sequence")}
        {'kl/k1': 0.333, 'kl/sequence': 0.5}
    """
    counted = mask.bool()
    logp = logp.detach().double()
    parts: dict[str, Tensor] = {}
    clusters = logp.new_zeros(len(MOMENTS), len(MEANS))
    if ref_logp is not None:
        u = logp - ref_logp.double()
        kept = counted if left_out is None else counted & ~left_out
        finite = kept & u.isfinite()
        u = torch.where(finite, u, 0.0)
        clusters = _clusters(u, finite, kept, classes)
        parts |= _far_from_reference(u, finite, kept, coefficient)
    behavior_logp = old_logp if engine_logp is None else engine_logp
    if behavior_logp is not None:
        parts |= _ratios(logp, behavior_logp, counted)
    if engine_logp is not None:
        parts |= _engine_gap(logp if old_logp is None else old_logp.double(), engine_logp.double(), counted)
    if gradient is not None:
        parts["gradient_kl"], parts["gradient_rest"] = gradient.double().unbind()
    nothing = nothing_seen(logp.device)[-len(SUMS) - len(MAXIMA) :].unbind()
    rest = [parts.get(name, zero).to(logp.dtype) for name, zero in zip((*SUMS, *MAXIMA), nothing, strict=True)]
    return torch.cat([clusters.flatten(), torch.stack(rest)])


def nothing_seen(device: torch.device | str) -> Tensor:
    """`(SIZE,)`. What `merged` adds nothing with: zeros, and -inf for the maxima."""
    seen = torch.zeros(SIZE, dtype=torch.float64, device=device)
    seen[-len(MAXIMA) :] = -math.inf
    return seen


def merged(parts: Tensor) -> Tensor:
    """`(SIZE,)` of `(n, SIZE)`: those of n micro-batches or ranks, as if they had been one."""
    return torch.cat([parts[:, : -len(MAXIMA)].sum(0), parts[:, -len(MAXIMA) :].amax(0)])


def monitor_metrics(sums: Tensor) -> dict[str, float]:
    """The numbers under their logged names (docs/monitoring.md); one device sync.

    A number that the data doesn't determine (no token in that bin, one completion for a standard error) is left out.
    """
    values = sums.tolist()
    means = values[: len(MEANS) * len(MOMENTS)]
    rest = dict(zip((*SUMS, *MAXIMA), values[len(means) :], strict=True))
    metrics: dict[str, float] = {}
    for column, name in enumerate(MEANS):
        mean, error = _mean_and_error(*means[column :: len(MEANS)])
        metrics |= {f"kl/{name}": mean} if mean is not None else {}
        metrics |= {f"kl/{name}_se": error} if error is not None else {}
    if rest["compared"]:
        metrics["kl/nonfinite"] = rest["compared"] - rest["finite"]
    if rest["finite"]:
        metrics |= {f"kl/dead_at_10/{k}": rest[f"{k}_above_10"] / rest["finite"] for k in ("k2", "k3")}
    if rest["with_coefficient"]:
        metrics["kl/dead"] = rest["dead"] / rest["with_coefficient"]
    if rest["weighed"]:
        metrics["kl/ratio_ess"] = rest["ratio"] * rest["ratio"] / rest["ratio_squared"] / rest["weighed"]
        tails = ("ratio_above_2", "ratio_above_10", "ratio_below_0.1")
        metrics |= {f"kl/{name}": rest[name] / rest["weighed"] for name in tails}
        metrics["kl/ratio_max"] = rest["ratio_max"]
    if rest["weighed"] + rest["ratio_unscored"]:
        metrics["kl/ratio_unscored"] = rest["ratio_unscored"]
    if rest["engine_scored"]:
        metrics |= {f"kl/{name}": rest[name] / rest["engine_scored"] for name in ("engine_gap", "engine_k1")}
        metrics["kl/engine_gap_max"] = rest["engine_gap_max"]
    if rest["engine_scored"] + rest["engine_unscored"]:
        metrics["kl/engine_unscored"] = rest["engine_unscored"]
    if rest["gradient_rest"] > 0 and math.isfinite(rest["gradient_kl"] / rest["gradient_rest"]):
        metrics["kl/gradient_ratio"] = math.sqrt(rest["gradient_kl"] / rest["gradient_rest"])
    return metrics


def coefficient(term: Tensor | None, logp: Tensor, mask: Tensor) -> Tensor | None:
    """(B, T), detached. The derivative of the host's own KL `term` by its log-probs, through its own float operations.

    Args:
        term: The host's KL, (B, T) or already summed up, as a tensor of the graph. None: the host has none.
        logp: (B, T), nats, with its graph.
        mask: (B, T). Which tokens of a (B, T) `term` count.

    Returns None where the term has no gradient.
    """
    if term is None or not term.requires_grad or not logp.requires_grad:
        return None
    counted = mask.to(term.dtype) if term.shape == mask.shape else torch.ones_like(term)
    return torch.autograd.grad(term, logp, counted, retain_graph=True, allow_unused=True)[0]


def squared_gradient_norms(loss: Tensor, term: Tensor, parameters: Sequence[Tensor]) -> Tensor | None:
    """`(2,)`: of the part of `loss` that goes through the KL `term`, and of the rest, with respect to `parameters`.

    `term` is any tensor of the graph of `loss`. With w = d loss / d term held fixed, the part is sum(w * term): its
    gradient and that of the rest add up to the loss's. None if the loss doesn't depend on the term.

    Takes two backward passes and holds one more gradient. The graph is kept, nothing is accumulated into `.grad`.
    """
    weight: Tensor | None = torch.autograd.grad(loss, term, retain_graph=True, allow_unused=True)[0]
    if weight is None:
        return None
    part = (weight * term).sum()
    squares = []
    for piece in (part, loss - part):
        gradients = torch.autograd.grad(piece, parameters, retain_graph=True, allow_unused=True)
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients if g is not None]
        squares.append(torch.stack([norm.to(loss.device) for norm in norms]).double().square().sum())
    return torch.stack(squares)


def _clusters(u: Tensor, finite: Tensor, counted: Tensor, classes: Tensor | None) -> Tensor:
    """(6, len(MEANS)) sums over completions, for the means and their standard errors."""
    n = finite.sum(-1).double()
    whole = ((n > 0) & (finite == counted).all(-1)).double()
    position = torch.arange(u.size(-1), device=u.device)
    starts = torch.stack([position >= edge for edge in (0, *POSITION_EDGES)], -1).double()
    bins = starts - torch.nn.functional.pad(starts[:, 1:], (0, 1))  # (T, len(POSITIONS)), one 1 in each row
    totals = [k1(u).sum(-1), k2(u).sum(-1), k3(_bounded(u)).sum(-1), u.sum(-1) * whole, *(u @ bins).unbind(-1)]
    tokens = [n, n, n, whole, *(finite.double() @ bins).unbind(-1)]
    for index in range(len(CLASSES)):
        chosen = torch.zeros_like(finite) if classes is None else finite & (classes == index)
        totals.append((u * chosen).sum(-1))
        tokens.append(chosen.sum(-1).double())
    s, n = torch.stack(totals, -1), torch.stack(tokens, -1)
    return torch.stack([x.sum(0) for x in (s, n, s.square(), s * n, n.square(), (n > 0).double())])


def _mean_and_error(
    total: float,
    tokens: float,
    total_squared: float,
    total_times_tokens: float,
    tokens_squared: float,
    clusters: float,
) -> tuple[float | None, float | None]:
    """The mean and its clustered standard error (see the top of this module); None where it isn't determined."""
    if not tokens:
        return None, None
    mean = total / tokens
    if clusters < 2:
        return mean, None
    residual = max(total_squared - 2 * mean * total_times_tokens + mean * mean * tokens_squared, 0.0)
    return mean, math.sqrt(clusters / (clusters - 1) * residual) / tokens


def _far_from_reference(u: Tensor, finite: Tensor, counted: Tensor, coefficient: Tensor | None) -> dict[str, Tensor]:
    """Where a clamp of the value at 10, or the host's own floats, leave a token without a KL gradient."""
    found = {"compared": counted.sum(), "finite": finite.sum()}
    found |= {"k2_above_10": (finite & (k2(u) > 10)).sum(), "k3_above_10": (finite & (k3(_bounded(u)) > 10)).sum()}
    if coefficient is not None:
        has_gradient = coefficient.isfinite() & (coefficient != 0)
        found |= {"with_coefficient": finite.sum(), "dead": (finite & ~has_gradient & (u.abs() > _ROUNDING)).sum()}
    return found


def _ratios(logp: Tensor, behavior_logp: Tensor, counted: Tensor) -> dict[str, Tensor]:
    log_ratio = logp - behavior_logp.double()
    scored = counted & log_ratio.isfinite()
    ratio = torch.where(scored, log_ratio, 0.0).clamp(max=_LARGEST_EXPONENT).exp() * scored
    return {
        "weighed": scored.sum(),
        "ratio": ratio.sum(),
        "ratio_squared": ratio.square().sum(),
        "ratio_above_2": (ratio > 2).sum(),
        "ratio_above_10": (ratio > 10).sum(),
        "ratio_below_0.1": (scored & (ratio < 0.1)).sum(),
        "ratio_unscored": (counted & ~scored).sum(),
        "ratio_max": torch.where(scored, ratio, -math.inf).max(),
    }


def _engine_gap(trainer_logp: Tensor, engine_logp: Tensor, counted: Tensor) -> dict[str, Tensor]:
    gap = engine_logp - trainer_logp
    scored = counted & gap.isfinite()
    gap = torch.where(scored, gap, 0.0)
    return {
        "engine_scored": scored.sum(),
        "engine_gap": gap.abs().sum(),
        "engine_k1": gap.sum(),
        "engine_unscored": (counted & ~scored).sum(),
        "engine_gap_max": torch.where(scored, gap.abs(), -math.inf).max(),
    }


def _bounded(u: Tensor) -> Tensor:
    """So that exp(-u) and its square are finite: beyond it k3 counts as e^300, very large but a number."""
    return u.clamp(min=-_LARGEST_EXPONENT)
