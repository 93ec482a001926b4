"""The picture and the numbers of `kl-plugins curves`: coefficients of KL terms against the log-ratio.

`matplotlib` is imported where it is used: it comes with the extra `plot`.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The coefficient of one term: d term / d log policy, at each log-ratio."""

    panel: str
    """Which panel it is drawn in: `ours`, `hosts` or `float32`."""
    name: str
    how: str
    """The function that was run, or the formula that stands for it."""
    dtype: str
    """The dtype of the inputs; OpenRLHF's function casts them to float32."""
    u: list[float]
    """Log-ratios log policy - log reference, in nats."""
    coefficient: list[float]
    zeros: list[tuple[float, float]]
    """Where it is exactly 0 although the policy has left the reference; ends at the last log-ratio computed."""


def write(found: Sequence[Curve], path: Path) -> None:
    """The numbers, as JSON (one object a curve; a number that isn't finite is null) or CSV (one row a point)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        rows = [asdict(curve) for curve in found]
        for row in rows:
            row["coefficient"] = [value if math.isfinite(value) else None for value in row["coefficient"]]
        path.write_text(json.dumps(rows) + "\n")
        return
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("panel", "curve", "how", "dtype", "u", "coefficient"))
        for curve in found:
            for u, value in zip(curve.u, curve.coefficient, strict=True):
                table.writerow((curve.panel, curve.name, curve.how, curve.dtype, u, value))


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """How a curve is drawn, and where its label stands (in data coordinates)."""

    colour: str
    line: Any = "-"
    width: float = 2.2
    ink: str = ""
    """Colour of the label, if it isn't the line's."""
    says: str
    at: tuple[float, float]


# Colour-blind safe (Okabe and Ito), and far enough from the page to be read as text; `sky` is for dashes on `blue`.
_LIGHT = {"blue": "#0072B2", "orange": "#C24E00", "green": "#00795A", "purple": "#A14A80", "sky": "#A5DAF8"}
_DARK = {"blue": "#3D9BE0", "orange": "#F0914A", "green": "#2FC79A", "purple": "#E39AC4", "sky": "#D6EEFF"}
_LIGHT |= {"page": "#FFFFFF", "text": "#222222", "soft": "#555555", "grid": "#E8E8E8", "frame": "#999999"}
_DARK |= {"page": "#0D1117", "text": "#E6EDF3", "soft": "#A9B4BF", "grid": "#232A33", "frame": "#6B7580"}

_DASHES, _DOTS = (0, (3, 3)), (0, (1, 1.2))
_DRAWN = {
    ("ours", "k1_as_loss"): _Drawn(
        colour="orange", says="k1 as loss: always 1,\nan expected gradient of 0", at=(-7.7, 1.5)
    ),
    ("ours", "k2_as_loss"): _Drawn(colour="blue", width=3, says="k2 as loss: u", at=(4.8, 3.7)),
    ("ours", "k1_in_reward"): _Drawn(
        colour="sky", line=_DASHES, ink="blue", says="k1 in reward (dashes): u", at=(4.8, 2.5)
    ),
    ("ours", "k3_as_loss"): _Drawn(colour="green", says="k3 as loss: 1 - exp(-u)", at=(-2.0, -9.0)),
    ("hosts", "TRL GRPO"): _Drawn(colour="blue", width=3, says="TRL GRPO: u", at=(5.0, 4.1)),
    ("hosts", "OpenRLHF unbiased_gradient"): _Drawn(
        colour="sky", line=_DASHES, ink="blue", says="OpenRLHF with unbiased\ngradient (dashes): u", at=(4.8, 1.6)
    ),
    ("hosts", "TRL GRPO, use_bias_correction_kl=False"): _Drawn(
        colour="green", says="TRL GRPO without its\nbias correction: 1 - exp(-u)", at=(-1.6, -10.4)
    ),
    ("hosts", "OpenRLHF k2"): _Drawn(
        colour="orange", width=3.6, says="OpenRLHF k2: exactly 0\nbelow {0:.2f}, above {1:.2f}", at=(4.8, -2.9)
    ),
    ("hosts", "OpenRLHF k3"): _Drawn(
        colour="purple",
        line=_DOTS,
        width=3.6,
        says="OpenRLHF k3:\nexactly 0 below {0:.2f},\nabove {1:.2f}",
        at=(-7.7, 1.0),
    ),
    ("float32", "TRL GRPO"): _Drawn(colour="orange", says="TRL GRPO: exp(-u) has rounded u away", at=(-85.5, 6)),
    ("float32", "k2_as_loss"): _Drawn(colour="blue", width=3, says="k2_as_loss of kl_plugins: u", at=(-58, -74)),
}
_PANELS = {
    "ours": ("What the names mean", (-8, 13), (-14, 9), 4),
    "hosts": ("What hosts ship, on-policy", (-8, 13), (-14, 9), 4),
    "float32": ("What float32 leaves of it, far below the reference", (-96, 2), (-104, 22), 20),
}


def plot(found: Sequence[Curve], path: Path, *, dark: bool = False) -> Path:
    """Draw the three panels; returns `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    theme = _DARK if dark else _LIGHT
    style: Any = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": theme["frame"],
        "axes.facecolor": theme["page"],
        "figure.facecolor": theme["page"],
        "text.color": theme["text"],
        "svg.fonttype": "none",
    }
    with plt.rc_context(style):
        figure, axes = plt.subplot_mosaic(
            [["ours", "hosts"], ["float32", "float32"]],
            figsize=(10, 7.4),
            height_ratios=(3, 2),
            layout="constrained",
        )
        for panel, axis in axes.items():
            _draw(axis, panel, [curve for curve in found if curve.panel == panel], theme)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def _draw(axis: Any, panel: str, found: Sequence[Curve], theme: dict[str, str]) -> None:
    from matplotlib.ticker import MultipleLocator

    title, xlim, ylim, ticks = _PANELS[panel]
    axis.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=theme["text"])
    axis.set_xlabel("u = log policy - log reference, of a token (nats)", color=theme["soft"])
    if panel != "hosts":
        axis.set_ylabel("coefficient of grad log policy", color=theme["soft"])
    axis.set_xlim(*xlim)
    axis.set_ylim(*ylim)
    axis.xaxis.set_major_locator(MultipleLocator(ticks))
    axis.yaxis.set_major_locator(MultipleLocator(2 * ticks if panel == "float32" else ticks))
    axis.grid(color=theme["grid"], linewidth=0.8)
    axis.axhline(0, color=theme["frame"], linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=theme["soft"], length=3)
    for curve in found:
        drawn = _DRAWN[panel, curve.name]
        colour = theme[drawn.colour]
        style = {"color": colour, "linestyle": drawn.line, "linewidth": drawn.width}
        for u, values in _pieces(curve):
            axis.plot(u, values, **style, solid_capstyle="butt", dash_capstyle="butt")
        ink = theme[drawn.ink or drawn.colour]
        says = drawn.says.format(curve.zeros[0][1], curve.zeros[-1][0]) if "{" in drawn.says else drawn.says
        says += "\n(its formula, not run)" if curve.how.startswith("formula") else ""
        axis.text(*drawn.at, says, color=ink, fontsize=9.5, linespacing=1.2)
        for low, high in curve.zeros:
            axis.axvspan(low, high, color=colour, alpha=0.09, linewidth=0)
        if panel == "float32":
            _annotate_float32(axis, curve, ink)


def _annotate_float32(axis: Any, curve: Curve, ink: str) -> None:
    """Where it is NaN, exactly 0 and furthest off."""
    lost = [u for u, value in zip(curve.u, curve.coefficient, strict=True) if not math.isfinite(value)]
    if lost:
        axis.axvspan(min(lost), max(lost), color=ink, alpha=0.3, linewidth=0)
        axis.text(sum(lost) / len(lost), -52, "NaN", color=ink, ha="center", fontsize=9.5, fontweight="bold")
    for low, high in curve.zeros:
        axis.text(
            (low + high) / 2, -16, f"exactly 0 from {high:.1f} to {low:.1f}", color=ink, ha="center", fontsize=9.5
        )
    off = max(
        ((u, value) for u, value in zip(curve.u, curve.coefficient, strict=True) if math.isfinite(value) and value),
        key=lambda point: abs(point[1] - point[0]),
    )
    if abs(off[1] - off[0]) > 1:
        axis.text(off[0] + 1, off[1] - 9, f"{off[1]:.0f} at u = {off[0]:.1f}", color=ink, fontsize=9.5)


def _pieces(curve: Curve) -> Iterator[tuple[list[float], list[float]]]:
    """The curve, broken where it jumps to 0 and where it isn't finite."""
    u: list[float] = []
    values: list[float] = []
    for x, y in zip(curve.u, curve.coefficient, strict=True):
        jumps = bool(values) and (y == 0) != (values[-1] == 0) and abs(y - values[-1]) > 0.5
        if (jumps or not math.isfinite(y)) and u:
            yield u, values
            u, values = [], []
        if math.isfinite(y):
            u.append(x)
            values.append(y)
    if u:
        yield u, values
