"""What a KL term multiplies the score of one token with, against its log-ratio u: which shape, and where it breaks.

Nothing is sampled, and no policy is enumerated: each log-ratio is a sequence of one token, on-policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kl_plugins.conformance.subject import GROUP, Scored, Subject

# What a coefficient can mean, of one token on-policy, against the log-ratio u.
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "u": lambda u: u,
    "1 - exp(-u)": lambda u: -torch.expm1(-u),
    "1": torch.ones_like,
    "sign(u)": torch.sign,
    "u^2/2": lambda u: u.square() / 2,
    "exp(-u) + u - 1": lambda u: torch.expm1(-u) + u,
    "|u|": torch.abs,
}
LARGEST = 1e3
UNDERFLOW = 700.0
"""Where a probability of e^-u is 0 in float64, and with it what any exact gradient multiplies."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Where the gradient of a single token, on-policy, is what it should be. Log-ratios u in nats, up to `LARGEST`."""

    shape: str
    """What the coefficient is near u = 0, of `SHAPES`; `"exact"`, or empty if it is none of them."""
    dead: tuple[float | None, float | None]
    """The gradient is exactly 0 for all u from -LARGEST to the first, and from the second on (float64); None: never.
    A dead stretch that ends before LARGEST counts as well."""
    right: tuple[float, float]
    """In float32 it is within 1% of `shape` for u in this interval (and |u| at least 0.01)."""
    nonfinite: tuple[float | None, float | None]
    """NaN or inf, of the gradient in float32, from here on; None: never."""


def _grid(sign: float) -> Tensor:
    """Log-ratios away from 0: fine up to 130, where float32's exponential ends, then in steps of 1%."""
    fine = torch.arange(1, 13001, dtype=torch.float64) / 100
    coarse = torch.logspace(math.log10(130), math.log10(LARGEST), 206, dtype=torch.float64)
    return sign * torch.cat([fine, coarse[1:]])


def log_ratio_range(subject: Subject) -> Range:
    """Where the gradient dies, loses its digits, or is no number. Every log-ratio is a sequence of one token.

    Exact terms: the error of the whole next-token gradient against its own in float64, 1% of it or 1e-6 nats, as the
    policy hardly ever draws what the exact gradient then is about.
    """
    dead: list[float | None] = []
    right, nonfinite = [], []
    shape = "exact" if subject.gradient is not None else _shape(subject)
    for sign in (-1.0, 1.0):
        u = _grid(sign)
        u = torch.cat([u[:-1:10], u[-1:]]) if subject.grouped else u
        wide, narrow = (_single(subject, u, dtype) for dtype in (torch.float64, torch.float32))
        dead.append(_first(u, (wide == 0).all(-1) & (u.abs() > 0.1) & (u.abs() < UNDERFLOW)))
        nonfinite.append(_first(u, ~narrow.isfinite().all(-1)))
        wanted = wide if shape in ("exact", "") else SHAPES[shape](u)[:, None]
        allowed = (0.01 * wanted.norm(dim=-1)).clamp(min=1e-6 if shape == "exact" else 0.0)
        off = (narrow.double() - wanted).norm(dim=-1) > allowed
        wrong = _first(u, off | ~narrow.isfinite().all(-1))
        right.append(
            float(u[-1]) if wrong is None else float(u[u.abs() < abs(wrong)][-1]) if abs(wrong) > 0.02 else 0.0
        )
    return Range(
        shape=shape, dead=(dead[0], dead[1]), right=(right[0], right[1]), nonfinite=(nonfinite[0], nonfinite[1])
    )


def _shape(subject: Subject) -> str:
    u = torch.tensor([-1.0, -0.5, -0.2, 0.2, 0.5, 1.0], dtype=torch.float64)
    found = _single(subject, u, torch.float64)[:, 0]
    for name, shape in SHAPES.items():
        if torch.allclose(found, shape(u), rtol=1e-5, atol=1e-6):  # some compute in float32 whatever they are given
            return name
    return ""


def _first(u: Tensor, found: Tensor) -> float | None:
    return float(u[found][0]) if found.any() else None


def _single(subject: Subject, u: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, 1) coefficients of one token at each log-ratio; (N, 2) next-token gradients of an exact term."""
    size = GROUP if subject.grouped else 1
    u = u.repeat_interleave(size)
    if subject.gradient is None:
        logp = torch.full_like(u, -1.0).to(dtype)[:, None]
        ref_logp = (logp.double() - u[:, None]).to(dtype)
        if subject.grouped:  # the others of the group are at u = 0, for a baseline of 0
            others = torch.arange(len(u))[:, None] % size != 0
            ref_logp = torch.where(others, logp, ref_logp)
        scored = Scored(
            logp=logp, ref_logp=ref_logp, mask=torch.ones_like(logp, dtype=torch.bool), old_logp=logp, group_size=size
        )
        assert subject.coefficient is not None
        return subject.coefficient(scored)[::size]
    # Two tokens; the one that is drawn has log-ratio about u: one of the two distributions gives it next to nothing.
    gap = torch.stack([u.abs(), torch.zeros_like(u)], dim=-1)[:, None]
    even = torch.zeros_like(gap)
    logits, ref_logits = (-gap, even) if float(u[0]) < 0 else (even, -gap)
    logits, ref_logits = logits.to(dtype), ref_logits.to(dtype)
    logp = logits.log_softmax(-1)[..., 0]
    scored = Scored(
        logp=logp,
        ref_logp=ref_logits.log_softmax(-1)[..., 0],
        mask=torch.ones_like(logp, dtype=torch.bool),
        old_logp=logp,
        group_size=size,
        tokens=torch.zeros_like(logp, dtype=torch.long),
        logits=logits,
        ref_logits=ref_logits,
    )
    return subject.gradient(scored)[::size, 0]


__all__ = ["LARGEST", "SHAPES", "Range", "log_ratio_range"]
