"""From measurements to what is said about a KL term: what it was found to be, and where that isn't what it claims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kl_plugins.conformance.measure import (
    LOCAL,
    Bias,
    Masking,
    best_scale,
    bias,
    expected_gradients,
    masking,
)
from kl_plugins.conformance.shapes import Range, log_ratio_range
from kl_plugins.conformance.subject import Subject
from kl_plugins.errors import ConfigError

CLAIMS = ("reverse_kl", "local_reverse_kl", "forward_kl", "local_forward_kl", "zero")
TOLERANCE = 1e-6
"""Of relative errors: some frameworks compute in float32 whatever they are given."""
WORDS = {
    "reverse_kl": "the reverse KL of whole sequences",
    "local_reverse_kl": "the next-token reverse KLs (prefixes held fixed)",
    "forward_kl": "the forward KL of whole sequences",
    "local_forward_kl": "the next-token forward KLs (prefixes held fixed)",
    "zero": "nothing: it is zero",
}
REACH = 50.0
"""Log-ratios up to which a gradient must be alive, right and finite, unless asked otherwise: a token e^-50 times as
likely as under the reference does occur once a policy has come to avoid it."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Everything that was measured of a term; `None` where a part wasn't asked for."""

    subject: Subject
    on_policy: Bias
    stale: Bias
    mismatch: Bias
    scale: tuple[float, float]
    """The factor that brings the on-policy gradient closest to the claimed (else the local reverse) one, and the error
    that is left."""
    range: Range
    masking: Masking

    def lines(self) -> list[str]:
        """What was measured, one statement a line, for a terminal."""
        biases = {"on-policy": self.on_policy, "stale samples": self.stale, "engine mismatch": self.mismatch}
        found = [f"{where}: {named(bias)}; {errors(bias)}" for where, bias in biases.items()]
        shape, dead = self.range.shape, self.range.dead
        found.append(f"coefficient of a token: {shape or 'none of the known ones'}")
        found.append(f"dead zone: {_beyond(dead, 'exactly 0', 'none')}")
        low, high = self.range.right
        finite = _beyond(self.range.nonfinite, "NaN or inf", "finite throughout")
        found.append(f"float32: right (1%) for u in [{low:.4g}, {high:.4g}]; {finite}")
        masks = [*(self.masking.problems() or ["respected"]), *self.masking.remarks()]
        found.append(f"masks and lengths: {'; '.join(masks)}")
        return found


def learn(subject: Subject, claims: str = "") -> Learned:
    """Measure everything. `claims` only chooses what `scale` is taken against."""
    means = {setting: expected_gradients(subject, setting) for setting in ("on_policy", "stale", "mismatch")}
    of = claims if claims in WORDS and claims != "zero" else "local_reverse_kl"
    return Learned(
        subject=subject,
        on_policy=bias(means["on_policy"], "on_policy"),
        stale=bias(means["stale"], "stale"),
        mismatch=bias(means["mismatch"], "mismatch"),
        scale=best_scale(means["on_policy"], of, "on_policy"),
        range=log_ratio_range(subject),
        masking=masking(subject),
    )


def named(found: Bias) -> str:
    """In words, which divergences have the gradient that was found."""
    names = [WORDS[name] for name in found.names(TOLERANCE)]
    return f"the gradient of {' or '.join(names)}" if names else "the gradient of none of the divergences"


def errors(found: Bias) -> str:
    """The relative errors against the two reverse KLs."""
    wanted = ("reverse_kl", "local_reverse_kl")
    return "relative error " + ", ".join(
        f"{_error(found.worst[of])} against {'the sequence' if of == 'reverse_kl' else 'the local'} reverse KL"
        for of in wanted
    )


def _error(value: float) -> str:
    return "0" if value <= 1e-12 else f"{value:.2g}"


def gradient_problem(learned: Learned, setting: str, claims: str) -> str:
    """Why the expected gradient isn't the claimed one; empty if it is."""
    found: Bias = getattr(learned, setting)
    if claims in found.names(TOLERANCE):
        return ""
    against = "" if claims == "zero" else f", {found.worst[claims]:.2g} off (the worst of nine policies)"
    text = f"{learned.subject.name} claims the gradient of {WORDS[claims]}{against}; measured: {named(found)}"
    scale, left = learned.scale
    if setting == "on_policy" and claims != "zero" and left <= TOLERANCE:
        why = "a mean over tokens, where a sum belongs" if scale > 0 else "a reward, where a loss belongs"
        text += f"; times {scale:.6g} it would be right ({why}?)"
    if setting != "on_policy" and not gradient_problem(learned, "on_policy", claims):
        text += f"; on-policy it is right, so what is missing are importance weights{_prefixes(claims)}"
    return text


def _prefixes(claims: str) -> str:
    return "" if claims in LOCAL else " of whole prefixes (a token's own ratio corrects that token only)"


def dead_problem(learned: Learned, claims: str, reach: float = REACH) -> str:
    """Where the gradient is exactly 0 although the policy has left the reference."""
    if claims == "zero":
        return ""
    where = [u for u in learned.range.dead if u is not None and abs(u) <= reach]
    if not where:
        return ""
    said = " and ".join(f"{'below' if u < 0 else 'above'} u = {u:.4g}" for u in where)
    return f"the gradient of {learned.subject.name} is exactly 0 {said} (u = log policy - log reference): a clamp?"


def float32_problem(learned: Learned, reach: float = REACH) -> str:
    """Where float32 loses the gradient or overflows."""
    found = learned.range
    where = [u for u in found.nonfinite if u is not None and abs(u) <= reach]
    if where:
        return f"in float32 the gradient of {learned.subject.name} is NaN or inf from u = {where[0]:.4g} on"
    low, high = found.right
    if found.shape and (low > -reach or high < reach):
        return (
            f"in float32 the gradient of {learned.subject.name} is {found.shape} to within 1% only for u in "
            f"[{low:.4g}, {high:.4g}], which is less than {reach:g} either way"
        )
    return ""


def masking_problem(learned: Learned) -> str:
    """What masked positions and padding wrongly do to the gradient; empty if nothing."""
    return "; ".join(learned.masking.problems())


def problems(learned: Learned, claims: str, *, off_policy: bool = True, reach: float = REACH) -> dict[str, str]:
    """Name of the check -> what is wrong, for the checks that fail. Raises `ConfigError` for an unknown claim."""
    if claims not in CLAIMS:
        raise ConfigError(f"claims={claims!r}: choose from {', '.join(map(repr, CLAIMS))}")
    found: dict[str, Callable[[], str]] = {
        "on-policy gradient": lambda: gradient_problem(learned, "on_policy", claims),
        "gradient on stale samples": lambda: gradient_problem(learned, "stale", claims) if off_policy else "",
        "gradient under an engine mismatch": lambda: (
            gradient_problem(learned, "mismatch", claims) if off_policy and learned.subject.knows_engine else ""
        ),
        "dead zone": lambda: dead_problem(learned, claims, reach),
        "float32": lambda: float32_problem(learned, reach),
        "masks and lengths": lambda: masking_problem(learned),
    }
    return {check: text for check, problem in found.items() if (text := problem())}


def _beyond(ends: tuple[float | None, float | None], what: str, never: str) -> str:
    low, high = ends
    sides = [f"from u = {low:.4g} down"] if low is not None else []
    sides += [f"from u = {high:.4g} up"] if high is not None else []
    return f"{what} {' and '.join(sides)}" if sides else never


__all__ = ["CLAIMS", "TOLERANCE", "WORDS", "Learned", "learn", "named", "problems"]
