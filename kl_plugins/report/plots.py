"""Read what a run logged in `metrics.jsonl`, and make a table of one run or a picture of several.

`matplotlib` is imported where it is used: it comes with the extra `plot`.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

# Colour-blind safe (Okabe and Ito), in an order in which neighbours differ in lightness too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555", "#000000")
# So that one of two runs that coincide does not hide the other.
LINE_STYLES = ("-", "-", "-", (0, (3, 2)), (0, (3, 2)), (0, (3, 2)), (0, (1, 1)), (0, (1, 1)))

# Title, the keys that can fill the panel (first one found in a row wins), lower and upper limit of the axis.
PANELS = (
    ("Reward", ("reward",), None, None),
    ("KL to the reference, as the trainer logs it (nats)", ("kl",), 0.0, None),
    ("Effective sample size of the KL's weights", ("kl/ess",), None, 1.0),
)

# Rows of the table of a single run: label, keys, format.
SUMMARY = (
    ("reward", ("reward",), ".3f"),
    ("KL to the reference: k1 (nats a token)", ("kl/k1",), ".4f"),
    ("KL to the reference: k2", ("kl/k2",), ".4f"),
    ("KL to the reference: k3", ("kl/k3",), ".4f"),
    ("KL as the host logs it", ("kl",), ".4f"),
    ("KL term of the loss, after beta", ("kl/loss",), ".5f"),
    ("effective sample size", ("kl/ess",), ".1%"),
    ("largest importance weight", ("kl/weight_max",), ".3f"),
    ("share of weights cut", ("kl/clipped",), ".1%"),
    ("entropy (nats a token)", ("entropy",), ".3f"),
    ("sampler and trainer differ by (mean |log-prob|)", ("sampling/sampling_logp_difference/mean",), ".4f"),
)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`. A last line that was cut off is left out, with a warning that says so.

    Raises `ValueError` for any other line that isn't a JSON object.
    """
    lines = [line for line in Path(path).read_text().splitlines() if line.strip()]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a JSON object was expected, found {type(row).__name__}")
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a row of metrics ({error})") from error
            warnings.warn(f"{path}: the last line was cut off and is left out", stacklevel=2)
        else:
            rows.append(row)
    return rows


def series(rows: Sequence[Row], *keys: str) -> tuple[list[float], list[float]]:
    """The steps and the values of a metric: of each row that has one of `keys`, the first of them."""
    steps, values = [], []
    for row in rows:
        value = next((row[key] for key in keys if row.get(key) is not None), None)
        if value is not None:
            steps.append(row["step"])
            values.append(float(value))
    return steps, values


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Centred running mean over about `width` values, shorter at the ends, taken twice.

    Twice, since a single pass leaves the zigzag of metrics that alternate between first and second use of a rollout.
    """
    for half in (width // 2, max(1, width // 4)):
        values = [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    return list(values)


def first_and_last(rows: Sequence[Row], *keys: str) -> tuple[float, float] | None:
    """Means of the first and of the last tenth of a run, at least one step each; None if nothing was logged."""
    values = series(rows, *keys)[1]
    share = max(1, len(values) // 10)
    return (statistics.fmean(values[:share]), statistics.fmean(values[-share:])) if values else None


def summary_table(rows: Sequence[Row], title: str) -> Any:
    """A `rich` table: each metric at the start and at the end of the run, and evaluation before and after."""
    from rich.table import Table

    steps = series(rows, "reward")[0]
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("first steps", justify="right")
    table.add_column("last steps", justify="right", style="bold")
    for label, keys, form in SUMMARY:
        if (ends := first_and_last(rows, *keys)) is not None:
            table.add_row(label, *(format(value, form) for value in ends))
    evaluated = series(rows, "eval_reward")[1]
    if len(evaluated) > 1:
        table.add_section()
        table.add_row("reward on unseen prompts", f"{evaluated[0]:.3f}", f"{evaluated[-1]:.3f}")
    if steps:
        share = max(1, len(steps) // 10)
        last, plural = max(row["step"] for row in rows), "s" * (share > 1)
        table.caption = f"{last} steps; first and last: means over {share} logged step{plural} each"
    return table


def plot_runs(runs: Mapping[str, Sequence[Row] | Sequence[Sequence[Row]]], path: str | Path, title: str = "") -> Path:
    """Draw reward, KL to the reference and effective sample size over the steps, one colour a run; returns `path`.

    `runs` maps a label to the rows of a run, or to a list of such (one per seed): then the line is the mean over seeds
    and the band reaches from the lowest to the highest.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    grouped = {label: _as_seeds(rows) for label, rows in runs.items()}
    panels = [panel for panel in PANELS if any(series(r, *panel[1])[1] for seeds in grouped.values() for r in seeds)]
    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#999999"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            1, max(1, len(panels)), figsize=(4.7 * max(1, len(panels)), 4.0), squeeze=False, layout="constrained"
        )
        for axis, (name, keys, low, high) in zip(axes[0], panels, strict=False):
            axis.set_title(name, fontsize=10.5, loc="left", color="#222222")
            axis.set_xlabel("optimizer step", color="#444444")
            axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.tick_params(colors="#444444", length=3)
            for index, (label, seeds) in enumerate(grouped.items()):
                colour, line = COLOURS[index % len(COLOURS)], LINE_STYLES[index % len(LINE_STYLES)]
                curves = [series(rows, *keys) for rows in seeds]
                _draw(axis, curves, label=label, colour=colour, line=line, crowd=len(grouped))
            axis.margins(x=0.02)
            axis.set_ylim(bottom=low)
            if high is not None:
                # From 0 to 1, weights that are all nearly 1 would be a line on the frame; but 0.999 should look high.
                bottom = min(axis.get_ylim()[0], high - 0.1)
                axis.set_ylim(bottom, high + 0.03 * (high - bottom))
                axis.yaxis.set_major_formatter(PercentFormatter(high, decimals=0))
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        if len(grouped) > 1:
            handles, labels = axes[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def _as_seeds(rows: Any) -> list[Sequence[Row]]:
    return [rows] if not rows or isinstance(rows[0], Mapping) else list(rows)


def _draw(
    axis: Any,
    curves: Sequence[tuple[list[float], list[float]]],
    *,
    label: str,
    colour: str,
    line: Any,
    crowd: int,
) -> None:
    curves = [curve for curve in curves if curve[1]]
    if not curves:  # the legend lists it although this panel has nothing of it
        axis.plot([], [], color=colour, linestyle=line, label=label)
        return
    if len(curves) == 1:
        steps, values = curves[0]
        if crowd == 1:
            axis.plot(steps, values, color=colour, alpha=0.22, linewidth=0.9)
    else:
        # Seeds may have been cut off at different steps: compare where all of them have a value.
        by_step = [dict(zip(*curve, strict=True)) for curve in curves]
        steps = sorted(set.intersection(*(set(curve) for curve in by_step)))
        columns = [[curve[step] for curve in by_step] for step in steps]
        width = max(1, len(steps) // 12)
        low, high = smoothed([min(c) for c in columns], width), smoothed([max(c) for c in columns], width)
        axis.fill_between(steps, low, high, color=colour, alpha=0.3 / (crowd + 1), linewidth=0)
        values = [statistics.fmean(c) for c in columns]
    axis.plot(
        steps, smoothed(values, max(1, len(steps) // 12)), color=colour, linestyle=line, linewidth=1.9, label=label
    )


__all__ = ["first_and_last", "plot_runs", "read_metrics", "series", "smoothed", "summary_table"]
