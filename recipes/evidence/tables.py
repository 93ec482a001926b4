"""A table on the terminal, and the same table in a document between two markers."""

from rich import box
from rich.table import Table


def show(console, title, columns, rows, left=1):
    """Print a table; the first `left` columns are words, the others numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


def markdown(columns, rows, left=1):
    """The table as Markdown."""
    rule = ["---" if i < left else "---:" for i in range(len(columns))]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (columns, rule, *rows))


def write_section(page, name, text):
    """Put `text` between `<!-- name -->` and `<!-- end of name -->` of a page, which has each of them once."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    whole = page.read_text()
    if whole.count(begin) != 1 or whole.count(end) != 1 or whole.index(begin) > whole.index(end):
        raise ValueError(f"{page}: one line {begin} and after it one line {end} were expected")
    before, after = whole.split(begin)[0], whole.split(end)[1]
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")
