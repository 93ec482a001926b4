"""What a test run ends with: the table host x trainer x configuration, and the slowest tests."""

from __future__ import annotations

from matrix import COLUMNS, REFUSED
from rich import box
from rich.console import Console
from rich.table import Table

# The environment variable with the file into which a pytest run writes its results, instead of printing them.
RESULT_FILE = "KL_PLUGINS_TEST_RESULTS"
WIDTH = 120


def table(cells) -> str:
    """`cells`: {(host, trainer, configuration): outcomes of its tests}."""
    made = Table("host", "trainer", box=box.SIMPLE, padding=0)
    for name in COLUMNS:
        made.add_column(heading(name), no_wrap=True)
    for host, trainer in sorted({(host, trainer) for host, trainer, _ in cells}):
        made.add_row(
            host,
            trainer.removesuffix("Trainer"),
            *(said(cells.get((host, trainer, name), []), name) for name in COLUMNS),
        )
    console = Console(width=WIDTH)
    with console.capture() as captured:
        console.print(made)
        console.print("ok: trained, with its term in the loss or the reward   -: refused, as it must be")
    return captured.get()


def heading(name: str) -> str:
    """`k1_in_reward sequence`, one word a line."""
    return (
        name.replace("_in_", " ")
        .replace("_as_", " ")
        .replace("_forward", " forward")
        .replace("sequence", "seq.")
        .replace(" ", "\n")
    )


def said(outcomes, name) -> str:
    if any(outcome != "passed" for outcome in outcomes):
        return "FAILED"
    return "" if not outcomes else "-" if name in REFUSED else "ok"


def slowest(durations, count: int = 10) -> str:
    """`durations`: (seconds, test)."""
    lines = [f"{seconds:7.2f} s  {test}" for seconds, test in sorted(durations, reverse=True)[:count]]
    return "\n".join([f"the slowest {len(lines)}", *lines])
