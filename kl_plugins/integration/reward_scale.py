"""What a KL beside divided rewards is divided by (`kl_scale`), and what beta counts then."""

from __future__ import annotations

from typing import Any

SCALES = ("none", "reward")


def scaling(settings: Any) -> str:
    """How the rewards of a config of TRL's GRPO or RLOO are divided: in words; empty if they aren't."""
    if getattr(settings, "normalize_advantages", False):
        return "normalize_advantages=True divides the advantages by the batch's standard deviation"
    if getattr(settings, "multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        return "multi_objective_aggregation='normalize_then_sum' divides rewards by several standard deviations"
    per = getattr(settings, "scale_rewards", "none")
    return "" if per == "none" else f"scale_rewards={per!r} divides rewards by the standard deviation of their {per}"


def meaning_of_beta(settings: Any) -> str:
    """What beta counts in a config of TRL's GRPO or RLOO whose rewards are divided; empty if they aren't."""
    how = scaling(settings)
    if not how:
        return ""
    if settings.kl_scale == "reward":
        return f"{how}, and kl_scale='reward' the KL with them: beta counts nats against rewards as they were given"
    return f"{how}, and not the KL: beta counts nats against rewards in units of that deviation (or kl_scale='reward')"
