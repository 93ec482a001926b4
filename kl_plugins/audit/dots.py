"""Values and intervals of the audit's rows as a picture, a line for each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kl_plugins.report.page import INK

Row = dict[str, Any]

KINDS = {"kl_plugins": "blue", "kl_plugins, refused": "red", "a host's own": "gold"}


def kind(row: Row) -> str:
    """Whether a row is a host's own term, one of kl_plugins', or one that kl_plugins refuses."""
    if not row["gradient_of"]:
        return "a host's own"
    return "kl_plugins, refused" if row["refused"] else "kl_plugins"


def legend(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """What the colours of the rows mean, as `Section.legend`."""
    return [(name, colour, "solid") for name, colour in KINDS.items() if any(kind(row) == name for row in rows)]


def draw_dots(
    axis: Any, rows: Sequence[Row], found: Sequence[dict[str, Any]], *, label: str, log: bool, limit: float = 1.6
) -> None:
    """Draw the value and interval of each row of `found` on a line of its own, beyond `limit` as a number."""
    for y, (row, numbers) in enumerate(zip(rows, found, strict=True)):
        colour, value = INK[KINDS[kind(row)]], numbers["value"]
        if value is None:
            continue
        low, high = (value if numbers[end] is None else numbers[end] for end in ("low", "high"))
        if not log:
            low, value, high = (max(0.0, x) for x in (low, value, high))
        if not log and value > limit:
            axis.annotate(f"{value:.1f} →", (limit, y), ha="right", va="center", color=colour)
            continue
        axis.plot([low, high if log else min(high, limit)], [y, y], color=colour, linewidth=1.6)
        axis.plot([value], [y], "o", color=colour, markersize=4.5)
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="x")
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(label, loc="right")
    if log:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.xaxis.set_minor_formatter(lambda x, _: "")
    else:
        axis.set_xlim(-0.04, limit)
        axis.axvline(1.0, color=INK["frame"], linewidth=0.8, linestyle=(0, (3, 3)))
        axis.axvline(0.0, color=INK["frame"], linewidth=0.8)
