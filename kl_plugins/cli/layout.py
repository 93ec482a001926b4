"""How the commands print: 80 columns are enough, lines end between words, and no word is broken or cut.

Text of users, of hosts and of third parties is printed as it is: no markup is read in it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = tuple[str, str]


def paragraph(
    console: Console, text: str, *, label: str = "", label_style: str = "bold", style: str = "", indent: int = 0
) -> None:
    """Print a label and a text, whose further lines begin below its first.

    A text with a word that the console has no room for beside the label begins on a line below it. A word that is
    wider than the console (a path, say) sticks out, whole.

    Args:
        indent: Columns to the left of both.
    """
    longest = max(map(len, text.split()), default=0)
    margin = indent + len(label) + bool(label)
    if label and margin + longest > console.width:
        unwrapped(console, label, indent=indent, style=label_style)
        label, margin = "", indent + 2
    lines = [
        line
        for part in text.splitlines()
        for line in textwrap.wrap(part, max(1, console.width - margin), break_long_words=False, break_on_hyphens=False)
    ]
    if label:
        first = Text.assemble(" " * indent, (label, label_style), " ", (lines.pop(0) if lines else "", style))
        first.rstrip()
        console.print(first, soft_wrap=True)
    for line in lines:
        unwrapped(console, line, indent=margin, style=style)


def definitions(console: Console, rows: Iterable[Row], *, label_style: str = "bold", indent: int = 0) -> None:
    """Print labels and their texts in two columns."""
    rows = list(rows)
    width = max((len(label) for label, _ in rows), default=0)
    for label, text in rows:
        paragraph(console, text, label=f"{label:{width}} ", label_style=label_style, indent=indent)


def word_table(*columns: str, title: str = "") -> Table:
    """A table of words, to be filled and then printed by `print_table`."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def print_table(console: Console, table: Table) -> None:
    """Print a table at its own width: a narrower console breaks its lines instead of cutting its words."""
    needed = console.measure(table, options=console.options.update(width=10_000)).maximum
    console.width = max(before := console.width, needed)
    console.print(table)
    console.width = before


def unwrapped(console: Console, text: str, *, indent: int = 0, style: str = "") -> None:
    """Print a line as it is, however long: a path, or what a log is searched for."""
    line = Text.assemble(" " * indent, (text, style))
    line.rstrip()
    console.print(line, soft_wrap=True)
