"""The scoreboard written down: a table in the terminal and in Markdown, all numbers as JSON, and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kl_plugins.errors import ConfigError
from kl_plugins.report.page import COLOURS, write

BEGIN, END = "<!-- scoreboard -->", "<!-- end of the scoreboard -->"
LEAST = 0.01
"""What the picture shows as 0."""
COLUMNS = (
    ("KL term", "left"),
    ("bias, on-policy", "right"),
    ("stale", "right"),
    ("mismatch", "right"),
    ("local bias, on-policy", "right"),
    ("stale", "right"),
    ("mismatch", "right"),
    ("MSE at 64", "right"),
    ("model: plain", "right"),
    ("steering", "right"),
    ("exactly 0 for u", "right"),
    ("float32 right for u", "right"),
    ("NaN for u", "right"),
    ("masks", "left"),
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """Rows of the scoreboard that behave alike."""

    names: list[str]
    ours: bool
    cells: tuple[str, ...]
    row: dict[str, Any]

    @property
    def said(self) -> str:
        """The names of the rows."""
        return "; ".join(self.names)


def lines(found: dict[str, Any]) -> list[Line]:
    """Those that agree in every cell together; ours first, then by mean squared error."""
    merged: dict[tuple[str, ...], Line] = {}
    for framework in found["frameworks"]:
        for row in framework["rows"]:
            ours = framework["framework"] == "kl_plugins"
            star = " *" if row["default"] and not ours else ""
            name = f"`{row['name']}`" if ours else f"{framework['framework']} {row['name']}{star}"
            cells = _cells(row)
            key = (str(ours), *cells, row["where"], *(cells if ours else ()))
            if key in merged:
                merged[key].names.append(name)
            else:
                merged[key] = Line(names=[name], ours=ours, cells=cells, row=row)
    return sorted(merged.values(), key=lambda line: (not line.ours, _typical_mse(line.row)))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    biases = [
        number(row["bias"][setting]["typical"][of])
        for of in ("reverse_kl", "local_reverse_kl")
        for setting in ("on_policy", "stale", "mismatch")
    ]
    models = [
        number(row["language_model"][task]["on_policy"]["mse"][0]) if row["language_model"] else "–"
        for task in ("plain", "steering")
    ]
    ranges = row["range"]
    low, high = ranges["right"]
    said = [
        text
        for name, text in (("finite", "wrong"), ("ragged", "padding"), ("nan", "NaN"), ("inf", "-inf"))
        if not row["masking"][name]
    ]
    return (
        *biases,
        number(_typical_mse(row)),
        *models,
        _outside(ranges["dead"]),
        "–"
        if not ranges["shape"]
        else "all"
        if min(-low, high) >= 1000
        else f"{low:.1f} to {high:.1f}".replace(".0", ""),
        _outside(ranges["nonfinite"]),
        ", ".join(said) or "ok",
    )


def _typical_mse(row: dict[str, Any]) -> float:
    values = row["mse"]["on_policy"]["of_each"]
    return math.exp(sum(map(math.log, values)) / len(values))


def number(value: float) -> str:
    """A number with two significant digits; 0 below float32's rounding."""
    if value != value:
        return "NaN"
    if value < 1e-6:
        return "0"
    if value < 0.0995:
        return f"{value:.3f}" if value >= 0.01 else f"{value:.0e}"
    return f"{value:.{0 if value >= 99.5 else 1 if value >= 9.95 else 2}f}"


def _outside(ends: list[float | None]) -> str:
    low, high = ends
    said = [f"< {low:.1f}"] if low is not None else []
    said += [f"> {high:.1f}"] if high is not None else []
    return ", ".join(said) or "never"


def show(found: dict[str, Any], console: Console) -> None:
    """The table in a terminal."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), title="KL gradients across frameworks", title_justify="left")
    for name, justify in COLUMNS:
        table.add_column(name, justify="left" if justify == "left" else "right", overflow="fold")
    for line in lines(found):
        table.add_row(line.said.replace("`", ""), *line.cells, style="bold" if line.ours else None)
    console.print(table)
    for text in (*legend(found), *goal_lines(found)):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def legend(found: dict[str, Any]) -> list[str]:
    """What the columns are, which versions were run, and what is missing."""
    versions = ", ".join(f"{each['framework']} {each['version']}" for each in found["frameworks"])
    said = [
        "Each row is a framework's own function, run (what sums a penalty in the reward over later tokens is ours); "
        "* is what it does once its KL is switched on, ours is bold. "
        "Bias: relative error of the expected gradient against that of the reverse KL of whole sequences; local "
        "bias: against the next-token reverse KLs at the sampled prefixes, which is all that a term of one token "
        "can be; by exact enumeration, geometric means of nine structured policies. Stale: an older policy drew "
        "the tokens; mismatch: a rollout engine did that differs from the trainer. MSE at 64: E|g - true|^2 / "
        "|true|^2 of a batch of 64 completions, true the sequence gradient (1: no better than none at all); "
        "model: the same on two small language models that are trained on the spot. u = log policy - log "
        "reference of a token: where the gradient is exactly 0 (float64), where it is right to 1% in float32 (of "
        "up to 1000; of exact terms the whole next-token gradient, to 1% or 1e-6 nats of float64's), and where it is "
        "no number. Masks: what leaks into the gradient from masked positions.",
        f"Versions: {versions}; Python {found['python']}; {found['seconds']:.0f} s.",
    ]
    return said + [f"Not here: {name}: {why}." for name, why in found["left_out"].items()]


def goal_lines(found: dict[str, Any]) -> Iterator[str]:
    """Each goal with what was measured, one a line."""
    goals = found["goals"]
    if "bias" in goals:
        worst = goals["bias"]["measured"]
        yield f"bias of our configurations with whole weights (float64): goal at most 1e-10, measured {worst:.1e}"
    for name, goal in goals.items():
        if name not in ("bias", "float32"):
            where = "the structured policies" if name == "mse" else f"the language model ({name.rpartition(' ')[2]})"
            low, high = goal["measured"]["low"], goal["measured"]["high"]
            interval = "" if low is None else f" [{low:.2f}, {high:.2f}]"
            yield (
                f"MSE of {goal['row']} on {where} over that of the best framework ({goal['best_peer']}): goal at most "
                f"{goal['goal']:g}, measured {goal['measured']['value']:.2f}{interval}; over the best unbiased one "
                f"({goal['best_unbiased']}): {goal['against_unbiased']['value']:.2f}{_ahead(goal)}"
            )
    if "float32" in goals:
        reach = goals["float32"]["measured"]
        yield f"float32 gradient of our reverse KLs is right to 1% for |u| up to: goal 1000, measured {reach:g}"


def _ahead(goal: dict[str, Any]) -> str:
    """From how many completions a batch it is the better one, where it isn't at 64."""
    ahead = goal.get("ahead_from")
    return (
        ""
        if ahead is None or goal["measured"]["value"] < 1
        else f"; ahead of the best from {ahead:.0f} completions on"
    )


def markdown(found: dict[str, Any], *, short: bool = False) -> str:
    """The table, what it says, and the goals. `short`: only what each does by default, and without some columns."""
    chosen = [i for i, (name, _) in enumerate(COLUMNS) if not short or i not in (5, 6, 8, 9, 13)]
    heads = [COLUMNS[i] for i in chosen]
    rows = [
        "| " + " | ".join(name for name, _ in heads) + " |",
        "|" + "|".join("---" if side == "left" else "---:" for _, side in heads) + "|",
    ]
    for line in lines(found):
        if short and not (line.row["default"] if line.ours else "*" in line.said):
            continue
        said = f"**{line.said}**" if line.ours else line.said
        rows.append("| " + " | ".join((said, *line.cells)[i] for i in chosen) + " |")
    goals = [f"- {text}" for text in goal_lines(found)]
    return "\n".join([*rows, "", *(f"{text}\n" for text in legend(found)), "Goals, as measured:", "", *goals, ""])


def check_markers(page: Path) -> tuple[str, str]:
    """What stands before and after the section of a page. Raises `ConfigError` unless both markers are there once."""
    text = page.read_text() if page.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(f"--page {page}: it must have a line {BEGIN!r} and after it a line {END!r}, once each")
    return text.partition(BEGIN)[0], text.partition(END)[2]


def write_all(found: dict[str, Any], out: Path, *, page: Path | None = None) -> list[Path]:
    """scoreboard.json, .md, .svg and .png in the folder `out`.

    With a `page` the PNG goes to the folder images beside it, and its section between the markers is replaced.
    """
    picture = (out if page is None else page.parent / "images") / "scoreboard.png"
    written = [
        write(out / "scoreboard.json", json.dumps(found, indent=1) + "\n"),
        write(out / "scoreboard.md", markdown(found)),
        *draw(found, out / "scoreboard.svg", picture),
    ]
    if page is not None:
        before, after = check_markers(page)
        written.append(write(page, f"{before}{BEGIN}\n{markdown(found, short=True)}{END}{after}"))
    return written


def draw(found: dict[str, Any], *files: Path) -> tuple[Path, ...]:
    """The picture, bias and error of every term, as each of `files`; an SVG has plain colours and shapes only."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    ink = {name: light for name, (light, _) in COLOURS.items()}
    chosen = [line for line in lines(found) if not line.ours or _shown(line.row)]
    chosen.sort(key=lambda line: -_typical_mse(line.row))
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
        figure = Figure(figsize=(8.4, 1.2 + 0.21 * len(chosen)), layout="constrained")
        axis = figure.add_subplot()
        axis.set_axisbelow(True)
        for y, line in enumerate(chosen):
            error, bias = _typical_mse(line.row), max(line.row["bias"]["stale"]["typical"]["reverse_kl"], LEAST)
            colour = ink["blue" if line.ours else "orange"]
            axis.plot([bias, error], [y, y], color=ink["grid"], linewidth=2, zorder=1)
            axis.plot([bias], [y], marker="D", markersize=5, color=colour, fillstyle="none", linestyle="none")
            axis.plot([error], [y], "o", markersize=6, color=colour)
        axis.set_yticks(range(len(chosen)), [_short(line) for line in chosen])
        axis.set_ylim(-0.7, len(chosen) - 0.3)
        axis.set_xscale("log")
        axis.set_xlim(LEAST * 0.85, 6)
        axis.set_xticks([LEAST, 0.03, 0.1, 0.3, 1, 3])
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "0" if x <= LEAST else f"{x:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("relative to the gradient of the reverse KL of whole sequences; less is better")
        axis.grid(axis="x", linewidth=0.6)
        axis.tick_params(axis="y", length=0)
        for name, colour, marker, fill in (
            ("squared error of a batch of 64", "soft", "o", "full"),
            ("bias on stale samples", "soft", "D", "none"),
            ("kl_plugins", "blue", "s", "full"),
            ("the frameworks' own functions", "orange", "s", "full"),
        ):
            axis.plot([], [], marker=marker, linestyle="none", color=ink[colour], label=name, fillstyle=fill)
        axis.legend(loc="lower center", bbox_to_anchor=(0.3, 1.0), ncols=2, fontsize=8)
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files


def _shown(row: dict[str, Any]) -> bool:
    """Of ours: the defaults, and what leaves no bias on stale samples."""
    return bool(row["default"] or row["bias"]["stale"]["typical"]["reverse_kl"] == 0)


def _short(line: Line) -> str:
    first = line.names[0].replace("`", "").replace(" *", "").replace("rollout_importance_sampling_mode=", "")
    return first if len(line.names) == 1 else f"{first}, and {len(line.names) - 1} more"


__all__ = ["BEGIN", "END", "check_markers", "draw", "goal_lines", "lines", "markdown", "number", "show", "write_all"]
