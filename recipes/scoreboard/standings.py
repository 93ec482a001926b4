"""What each framework's default reaches of the attainable objective: the headline table, and the picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kl_plugins.report.page import COLOURS
from kl_plugins.report.runs import mean_and_width

OURS = "kl_plugins reverse_kl"
LOWEST = -0.25
"""The share that the picture ends at."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a framework's default reaches of the attainable objective, in one regime of one problem."""

    mean: float
    half: float
    """Half the width of the 95% interval over seeds."""

    def against(self, other: Share) -> str:
        """`"ahead"` or `"behind"` if the two intervals don't overlap, else `"tie"`."""
        if self.mean - self.half > other.mean + other.half:
            return "ahead"
        return "behind" if self.mean + self.half < other.mean - other.half else "tie"


def shares(found: dict[str, Any], problem: str) -> dict[str, dict[str, Share]]:
    """Name of a framework's default -> regime -> its share; the best on-policy first. Ours is called `OURS`."""
    table = {
        f"{framework['framework']} {row['name']}": {
            regime: Share(**dict(zip(("mean", "half"), mean_and_width(values), strict=True)))
            for regime, values in row["shares"][problem].items()
        }
        for framework in found["frameworks"]
        for row in framework["trained"]
    }
    return dict(sorted(table.items(), key=lambda item: -_first(item[1]).mean))


def _first(cells: dict[str, Share]) -> Share:
    """Of the first regime, which is on-policy."""
    return next(iter(cells.values()))


def problems(found: dict[str, Any]) -> list[str]:
    """The rewards that were trained on."""
    return [name for row in found["frameworks"][0]["trained"][:1] for name in row["shares"]]


def share_table(found: dict[str, Any], problem: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows. Behind a share stands whether it ties with ours, or is ahead of it."""
    table = shares(found, problem)
    ours = table.get(OURS, {})
    merged: dict[tuple[str, ...], list[str]] = {}
    for name, cells in table.items():
        said = [_said(each, None if name == OURS else ours.get(regime)) for regime, each in cells.items()]
        merged.setdefault((str(name == OURS), *said), []).append("`reverse_kl`" if name == OURS else name)
    rows = [["; ".join(names), *cells] for (_, *cells), names in merged.items()]
    regimes = list(next(iter(table.values()), {}))
    return [f"{problem} reward", *regimes], rows


def _said(share: Share, ours: Share | None) -> str:
    text = f"{share.mean:.3f} ± {share.half:.3f}"
    verdict = share.against(ours) if ours else "behind"
    return text if verdict == "behind" else f"{text} ({verdict})"


def draw(found: dict[str, Any], *files: Path) -> tuple[Path, ...]:
    """The picture, the shares of each reward, as each of `files`; an SVG has plain colours and shapes only."""
    import matplotlib
    from matplotlib.figure import Figure

    ink = {name: light for name, (light, _) in COLOURS.items()}
    rewards = problems(found)
    tables = [shares(found, reward) for reward in rewards]
    worst = {name: min(_first(table[name]).mean for table in tables) for name in tables[0]}
    names = sorted(worst, key=worst.__getitem__)
    style: Any = {
        "font.size": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": ink["frame"],
        "axes.labelcolor": ink["soft"],
        "text.color": ink["text"],
        "xtick.color": ink["soft"],
        "ytick.color": ink["soft"],
        "grid.color": ink["grid"],
        "legend.frameon": False,
        "text.parse_math": False,  # a dollar in a name is a dollar
        "svg.hashsalt": "scoreboard",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10.5, 1.4 + 0.42 * len(names)), layout="constrained")
        axes = figure.subplots(1, len(rewards), sharey=True, squeeze=False)[0]
        for axis, problem in zip(axes, rewards, strict=True):
            _draw_shares(axis, shares(found, problem), names, ink)
            axis.set_title(f"{problem} reward", loc="left", fontsize=9)
        axes[0].set_yticks(range(len(names)), ["reverse_kl (ours)" if name == OURS else name for name in names])
        figure.supxlabel("share of the attainable E[R] - beta KL: 0 the reference, 1 the optimum", fontsize=8.5)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files


def _draw_shares(axis: Any, table: dict[str, dict[str, Share]], names: list[str], ink: dict[str, str]) -> None:
    """A line for each default; its regimes one below the other. What is lower than the axis is an arrow at its end."""
    regimes = list(next(iter(table.values())))
    for y, name in enumerate(names):
        for i, regime in enumerate(regimes):
            share, at = table[name][regime], y + 0.27 - 0.18 * i
            colour = ink["blue" if name == OURS else "orange"]
            low = share.mean < LOWEST
            marker = "<" if low else "osD^"[i % 4]
            fill = "full" if i == 0 else "none"
            options = {"color": colour, "markersize": 4.5, "fillstyle": fill, "elinewidth": 1}
            width = 0.0 if low else share.half
            axis.errorbar([max(share.mean, LOWEST)], [at], xerr=[width], marker=marker, linestyle="none", **options)
            if low and i == 0:
                axis.annotate(f"{share.mean:.1f}", (LOWEST, at), (5, -3), textcoords="offset points", fontsize=7)
    for i, regime in enumerate(regimes):
        fill = "full" if i == 0 else "none"
        axis.plot([], [], "osD^"[i % 4], color=ink["soft"], markersize=4.5, fillstyle=fill, label=regime)
    axis.set_axisbelow(True)
    axis.axvline(1, color=ink["soft"], linewidth=0.8)
    axis.set_xlim(LOWEST - 0.03, 1.05)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.grid(axis="x", linewidth=0.6)
    axis.tick_params(axis="y", length=0)
    for y in range(len(names) - 1):
        axis.axhline(y + 0.5, color=ink["grid"], linewidth=0.6)


__all__ = ["OURS", "Share", "draw", "problems", "share_table", "shares"]
