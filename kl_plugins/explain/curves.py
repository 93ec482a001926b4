"""What each KL term multiplies the score with, against the log-ratio.

The first figure of Liu et al., arXiv 2510.01555, computed from the functions themselves: ours, and those of the hosts
that can be imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kl_plugins.report.curves import Curve

if TYPE_CHECKING:
    from torch import Tensor

    from kl_plugins.conformance.subject import Subject

# Where the curves are computed: first and last log-ratio (nats), number of points.
AROUND_0, FAR_BELOW = (-8.0, 13.0, 2101), (-96.0, 0.0, 1921)
OURS = (("k1_as_loss", "token"), ("k2_as_loss", "token"), ("k1_in_reward", "token"), ("k3_as_loss", "token"))
OPENRLHF = ("k2", "k3", "unbiased_gradient")


def all_curves() -> tuple[list[Curve], list[str]]:
    """Every curve that can be computed here, and what was left out, with the reason."""
    import torch

    from kl_plugins.conformance.hosts import installed

    around, far = (torch.linspace(*where, dtype=torch.float64) for where in (AROUND_0, FAR_BELOW))
    ours = {name: own_term(name, credit) for name, credit in OURS}
    (corrected, plain, *_), _ = installed("TRL")
    openrlhf, problem = installed("OpenRLHF")
    found = [_curve("ours", name, term, around) for name, term in ours.items()]
    found.append(_curve("hosts", "TRL GRPO", corrected.subject, around))
    found.append(_curve("hosts", "TRL GRPO, use_bias_correction_kl=False", plain.subject, around))
    for term in openrlhf:
        if term.subject.name in OPENRLHF:
            found.append(_curve("hosts", f"OpenRLHF {term.subject.name}", term.subject, around))
    found.append(_curve("float32", "TRL GRPO", corrected.subject, far.float()))
    found.append(_curve("float32", "k2_as_loss", ours["k2_as_loss"], far.float()))
    return found, [f"OpenRLHF's curves are left out: {problem}"] if problem else []


def own_term(name: str, credit: str) -> Subject:
    """One of our own configurations, refused ones too."""
    from kl_plugins.conformance.subject import from_spec
    from kl_plugins.core.spec import KLSpec

    spec = KLSpec(name=name, credit=credit, allow_biased=True)
    return from_spec(spec, origin=f"kl_plugins.kl_terms, credit {credit}")


def coefficients(term: Subject, u: Tensor) -> Tensor:
    """(N,) what the score of a token is multiplied with at each of the (N,) log-ratios `u`, in their dtype."""
    import torch

    from kl_plugins.conformance.subject import Scored

    row = u.detach()[None]  # the reference's log-probs are 0, and the policy itself drew the tokens
    mask = torch.ones_like(row, dtype=torch.bool)
    assert term.coefficient is not None, f"{term.name} is no term of a sampled token"
    return term.coefficient(Scored(logp=row, ref_logp=torch.zeros_like(row), mask=mask, old_logp=row))[0]


def exact_zeros(term: Subject, u: Tensor) -> list[tuple[float, float]]:
    """Intervals of the log-ratio in which the coefficient is exactly 0; their ends are bisected, or those of `u`."""
    dead = ((coefficients(term, u) == 0) & (u.abs() > 1e-6)).tolist()  # next to 0, float32 rounds to 0 as well
    edges = [i for i in range(1, len(dead)) if dead[i] != dead[i - 1]]
    ends = [_bisected(term, float(u[i - 1]), float(u[i]), u.dtype) for i in edges]
    ends = ([float(u[0])] if dead[0] else []) + ends + ([float(u[-1])] if dead[-1] else [])
    return list(zip(ends[::2], ends[1::2], strict=True))


def _bisected(term: Subject, low: float, high: float, dtype: Any) -> float:
    import torch

    def is_dead(u: float) -> bool:
        return bool(coefficients(term, torch.tensor([u], dtype=dtype)) == 0)

    starts_dead = is_dead(low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_dead(middle) == starts_dead else (low, middle)
    return low if starts_dead else high


def _curve(panel: str, name: str, term: Subject, u: Tensor) -> Curve:
    return Curve(
        panel=panel,
        name=name,
        how=term.origin,
        dtype=str(u.dtype).removeprefix("torch."),
        u=u.tolist(),
        coefficient=coefficients(term, u).tolist(),
        zeros=exact_zeros(term, u),
    )
