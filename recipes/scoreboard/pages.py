"""The scoreboard written down: tables in the terminal and in Markdown, all numbers as JSON, and the picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from language_model import jackknife
from rich import box
from rich.console import Console
from rich.table import Table
from standings import draw, problems, share_table

from kl_plugins.errors import ConfigError
from kl_plugins.report.page import write

BEGIN, END = "<!-- scoreboard -->", "<!-- end of the scoreboard -->"
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
ERRORS = (7, 8, 9)
"""Which of the columns are about the error of the KL's gradient by itself."""
NO_AIM = (
    "The squared error of the KL's gradient by itself, of 64 completions, relative to the gradient of the sequence's "
    "reverse KL (1: no better than none). This is not the aim: what is optimized is E[R] - beta KL, and the noise of "
    "its two parts belongs together. A KL that is treated as the reward is cancels the reward's noise, so that the "
    "terms with the least noise of their own are not those that train best."
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
    """Those that agree in every cell together; ours first, then by bias on-policy."""
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
    return sorted(
        merged.values(), key=lambda line: (not line.ours, line.row["bias"]["on_policy"]["typical"]["reverse_kl"])
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    biases = [
        number(row["bias"][setting]["typical"][of])
        for of in ("reverse_kl", "local_reverse_kl")
        for setting in ("on_policy", "stale", "mismatch")
    ]
    models = [
        _with_interval(row["language_model"][task]["on_policy"]["mse"]) if row["language_model"] else "–"
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


def _with_interval(values: list[float]) -> str:
    found = jackknife(values)
    return f"{number(found['value'])} ± {number(found['high'] - found['value'])}"


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
    """The tables in a terminal."""
    for title, columns, rows, says in tables(found):
        table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), title=title, title_justify="left")
        for i, name in enumerate(columns):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for name, *cells in rows:
            table.add_row(name.replace("`", ""), *cells, style="bold" if name.startswith("`") else None)
        console.print(table)
        console.print(says, markup=False, highlight=False, soft_wrap=True)
    for text in (*legend(found), *goal_lines(found)):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def tables(found: dict[str, Any], *, short: bool = False) -> Iterator[tuple[str, list[str], list[list[str]], str]]:
    """Each table with its title, columns, rows and what is said below it; those of ours are in backticks.

    `short`: of the terms only what each does by default, and without some columns.
    """
    for problem in problems(found):
        yield (f"Share of the attainable E[R] - beta KL, {problem} reward", *share_table(found, problem), "")
    chosen = [line for line in lines(found) if not short or (line.row["default"] if line.ours else "*" in line.said)]
    narrow = (5, 6) if short else ()
    facts = [i for i in range(len(COLUMNS)) if i not in (*ERRORS, *narrow)]
    for title, columns, says in (
        ("What each KL term's gradient is", facts, FACTS),
        ("How noisy the KL's gradient is by itself", [0, *ERRORS], NO_AIM),
    ):
        rows = [[(line.said, *line.cells)[i] for i in columns] for line in chosen]
        yield title, [COLUMNS[i][0] for i in columns], rows, says


FACTS = (
    "Each row is a framework's own function, run (what sums a penalty in the reward over later tokens is ours); * is "
    "what it does once its KL is switched on, ours is bold. Bias: relative error of the expected gradient against "
    "that of the reverse KL of whole sequences; local bias: against the next-token reverse KLs at the sampled "
    "prefixes, which is all that a term of one token can be; by exact enumeration, geometric means of nine structured "
    "policies. Stale: an older policy drew the tokens; mismatch: a rollout engine did that differs from the trainer. "
    "u = log policy - log reference of a token: where the gradient is exactly 0 (float64), where it is right to 1% in "
    "float32 (of up to 1000; of exact terms the whole next-token gradient, to 1% or 1e-6 nats of float64's), and "
    "where it is no number. Masks: what leaks into the gradient from masked positions."
)


def legend(found: dict[str, Any]) -> list[str]:
    """How the shares were measured, which versions were run, and what is missing."""
    versions = ", ".join(f"{each['framework']} {each['version']}" for each in found["frameworks"])
    seeds = {len(values) for problem in problems(found) for row in _trained(found) for values in row[problem].values()}
    said = [
        "Shares: 0 is the reference, 1 the best policy there is, below 0 training made things worse. Every default is "
        "trained in one loop (`kl_plugins.conformance.known_optimum`: completions of 16 tokens, 200 rollouts of 64 in "
        "groups of 8, GRPO's policy loss; rewards aren't divided by a deviation), a KL in the reward down to the "
        "advantages by the framework's own functions. Means and 95% intervals over "
        f"{'/'.join(map(str, sorted(seeds)))} seeds, each a problem of its own. Tie: the interval overlaps that "
        "of `reverse_kl`; ahead: it lies above.",
        "4 updates a batch: at Adam's rate 0.02 instead of 0.05. 8 updates stale: the policy that draws, and with it "
        "the KL of a rollout's reward, lags 8 updates behind. An engine that differs: the logits that it draws from "
        "are off by 0.2 (standard deviation, the same all along), its log-probs are known.",
    ]
    said.append(f"Versions: {versions}; Python {found['python']}; {found['seconds']:.0f} s.")
    return said + [f"Not here: {name}: {why}." for name, why in found["left_out"].items()]


def _trained(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [row["shares"] for framework in found["frameworks"] for row in framework["trained"]]


def goal_lines(found: dict[str, Any]) -> Iterator[str]:
    """Each goal with what was measured, one a line."""
    goals = found["goals"]
    for problem, share in goals.get("attained", {}).items():
        yield (
            f"share of the attainable that reverse_kl reaches on-policy, {problem} reward: goal at least 0.98, "
            f"measured {share['mean']:.3f} ± {share['half']:.3f}"
        )
    if "ahead" in goals:
        clear, others = goals["ahead"]["regimes"], goals["ahead"]["not"]
        yield f"reverse_kl reaches more than every framework's default, intervals apart: in {clear}"
        yield from (
            f"not apart: {name} ({verdict}), {problem} reward, {regime}" for problem, regime, name, verdict in others
        )
    worst = goals["bias"]["measured"]
    yield f"bias of our configurations with whole weights (float64): goal at most 1e-10, measured {worst:.1e}"
    if "float32" in goals:
        reach = goals["float32"]["measured"]
        yield f"float32 gradient of our reverse KLs is right to 1% for |u| up to: goal 1000, measured {reach:g}"


def markdown(found: dict[str, Any], *, short: bool = False) -> str:
    """The tables, what they say, and the goals."""
    parts = []
    for title, columns, rows, says in tables(found, short=short):
        rule = ["---", *["---:"] * (len(columns) - 1)]
        bold = [[f"**{name}**" if name.startswith("`") else name, *cells] for name, *cells in rows]
        parts += [f"### {title}", "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *bold)), says]
    goals = "\n".join(f"- {text}" for text in goal_lines(found))
    return (
        "\n\n".join(filter(None, [*parts, "### How it was measured", *legend(found), "Goals, as measured:", goals]))
        + "\n"
    )


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


__all__ = ["BEGIN", "END", "check_markers", "goal_lines", "lines", "markdown", "number", "show", "write_all"]
