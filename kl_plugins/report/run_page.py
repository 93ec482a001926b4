"""The page of `kl-plugins report`: training runs side by side, seeds of a configuration averaged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from kl_plugins.report.page import (
    INK,
    SERIES,
    Picture,
    Section,
    Table,
    can_draw,
    compact,
    picture,
    provenance,
    render,
)
from kl_plugins.report.plots import smoothed
from kl_plugins.report.runs import METRICS, LoggedRun, Metric, mean_and_width, mean_over_seeds, pieces

LINES = ("solid", "dashed", "dotted")


def report_page(runs: dict[str, list[LoggedRun]]) -> str:
    """The page of `runs`, by the name of their configuration, as HTML."""
    shown = [m for m in METRICS if any(m.title in run.curves for seeds in runs.values() for run in seeds)]
    missing = [m.keys[0] for m in METRICS if m.asked and m not in shown]
    colours = {name: (SERIES[i % len(SERIES)], LINES[i // len(SERIES) % len(LINES)]) for i, name in enumerate(runs)}
    notices = [
        f"{run.path}: the last line was cut off; read up to there, step {run.steps}."
        for seeds in runs.values()
        for run in seeds
        if run.cut_off
    ]
    if not can_draw():
        notices.append("Without pictures: matplotlib isn't installed (pip install 'kl_plugins[plot]').")
    several = any(len(seeds) > 1 for seeds in runs.values())
    text = ["Lines are running means over about a twelfth of the steps."]
    if several:
        text.append(
            "Where a configuration has several seeds the line is their mean at the steps that all of them have, and "
            "the band its 95% interval (Student's t). Two seeds are drawn as thin lines instead: the interval, which "
            "is in the tables, would fill the picture."
        )
    count = sum(map(len, runs.values()))
    sections = [
        Section(title="Runs", tables=[_runs_table(runs)], items=_left_out(missing)),
        Section(
            title="Over the steps",
            text=text,
            legend=[(name, *colours[name]) for name in runs],
            pictures=[_draw(metric, runs, colours) for metric in shown] if can_draw() else (),
        ),
        Section(
            title="In numbers",
            text=["First and last: means over the first and the last tenth of the steps, at least one each."],
            tables=[_numbers(metric, runs) for metric in shown],
        ),
        Section(title="What the numbers mean", items=[f"{m.title} ({m.keys[0]}): {m.means}" for m in shown]),
        Section(title="How this was made", tables=[provenance()]),
    ]
    plural = "s" * (count > 1)
    lead = [f"{count} run{plural} of {len(runs)} configuration{'s' * (len(runs) > 1)}: {', '.join(runs)}."]
    return render(title=f"Training run{plural}", lead=lead, sections=sections, notices=notices)


def _left_out(missing: Sequence[str]) -> list[str]:
    return [f"Left out, since no run logged it: {', '.join(missing)}."] if missing else []


def _runs_table(runs: dict[str, list[LoggedRun]]) -> Table:
    rows = []
    for name, seeds in runs.items():
        for run in seeds:
            lost = sum(math.isnan(value) for curve in run.curves.values() for value in curve.values())
            absent = [m.keys[0] for m in METRICS if m.asked and m.title not in run.curves]
            rows.append(
                (
                    name,
                    str(run.path),
                    str(run.steps),
                    "cut off" if run.cut_off else "complete",
                    str(lost),
                    ", ".join(absent) or "none",
                )
            )
    columns = ("configuration", "metrics", "last step", "file", "NaN or inf", "not logged")
    return Table(columns=columns, rows=rows, words=frozenset({0, 1, 3, 5}))


def _numbers(metric: Metric, runs: dict[str, list[LoggedRun]]) -> Table:
    rows = []
    for name, seeds in runs.items():
        curves = [run.curves[metric.title] for run in seeds if metric.title in run.curves]
        finite = [[v for _, v in sorted(curve.items()) if not math.isnan(v)] for curve in curves]
        lost = sum(len(curve) for curve in curves) - sum(map(len, finite))
        finite = [values for values in finite if values]
        if not finite:
            rows.append((name, str(len(seeds)), *["–"] * 4, str(lost)))
            continue
        ends = [
            mean_and_width([statistics.fmean(part(values, max(1, len(values) // 10))) for values in finite])
            for part in (_first, _last)
        ]
        rows.append(
            (
                name,
                f"{len(curves)} of {len(seeds)}" if len(curves) < len(seeds) else str(len(seeds)),
                *(compact(mean) + (f" ± {compact(width)}" if len(finite) > 1 else "") for mean, width in ends),
                compact(min(map(min, finite))),
                compact(max(map(max, finite))),
                str(lost),
            )
        )
    columns = ("configuration", "seeds", "first", "last", "lowest", "highest", "NaN or inf")
    return Table(columns=columns, rows=rows, caption=f"{metric.title} ({metric.keys[0]})")


def _first(values: list[float], count: int) -> list[float]:
    return values[:count]


def _last(values: list[float], count: int) -> list[float]:
    return values[-count:]


def _draw(metric: Metric, runs: dict[str, list[LoggedRun]], colours: dict[str, tuple[str, str]]) -> Picture:
    single = len(runs) == 1 and len(next(iter(runs.values()))) == 1

    def draw(axis: Any) -> None:
        heights = []
        for name, seeds in runs.items():
            curves = [run.curves[metric.title] for run in seeds if metric.title in run.curves]
            if not curves:
                continue
            mean, (colour, line) = mean_over_seeds(curves), colours[name]
            for curve in curves if single or len(curves) == 2 else ():
                thin = [value for _, value in sorted(curve.items())]
                axis.plot(sorted(curve), thin, color=INK[colour], alpha=0.35, linewidth=0.8)
                heights += [value for value in thin if not math.isnan(value)]
            for steps, values, widths in pieces(mean):
                width = max(1, len(mean.steps) // 12)
                middle, half = smoothed(values, width), smoothed(widths, width)
                axis.plot(steps, middle, color=INK[colour], linestyle=line, linewidth=1.8)
                if len(steps) == 1:
                    axis.plot(steps, middle, ".", color=INK[colour])
                if any(half) and len(curves) > 2:
                    band = [[m + sign * h for m, h in zip(middle, half, strict=True)] for sign in (-1, 1)]
                    axis.fill_between(steps, *band, color=INK[colour], alpha=0.16, linewidth=0)
                heights += middle
        if heights:  # bands of few seeds may go further
            low, high = min(heights), max(heights)
            room = 0.25 * (high - low) or 0.05 * abs(high) or 0.05
            axis.set_ylim(low - room, high + room)
        axis.grid(axis="y")
        axis.margins(x=0.02)
        axis.set_title(metric.title, loc="left", fontsize=9.5)
        axis.set_xlabel("optimizer step", loc="right")

    alt = f"{metric.title} over the steps of {', '.join(runs)}; its numbers are in the table of that name"
    return picture(draw, name=f"metric-{METRICS.index(metric)}", alt=alt, size=(4.2, 2.5))
