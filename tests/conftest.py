"""The table that a test run ends with: host x trainer x configuration, and whether its tests passed."""

from __future__ import annotations

import gc
import json
import os
from collections import defaultdict
from pathlib import Path

# Read when the libraries are imported, here and in every process that a test starts.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # these tensors are tiny: a second thread only waits for the first

import pytest
from matrix import COLUMNS, REFUSED
from rich import box
from rich.console import Console
from rich.table import Table

from kl_plugins.patching.versions import installed_version

COVERS = "covers"
# A suite that runs under another version of a host, within a test of this one, hands its rows over in this file.
ROWS_FILE = "KL_PLUGINS_MATRIX_ROWS"


def pytest_collection_finish():
    """Trainers collect garbage at the end of each training: spare them the million objects that the imports made."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def covers(record_property):
    """`covers(host, trainer, configuration)`: the cell of the table that the result of this test goes into."""

    def record(host, trainer, configuration):
        assert configuration in COLUMNS
        record_property(COVERS, json.dumps([f"{host} {installed_version(host)}", trainer, configuration]))

    return record


@pytest.fixture
def rows_of(record_property, tmp_path):
    """The environment variable for a nested suite, and a function that takes over the rows which that has written."""
    path = tmp_path / "rows.jsonl"

    def take():
        rows = path.read_text().splitlines() if path.exists() else []
        for row in rows:
            record_property("covered", row)
        return [json.loads(row) for row in rows]

    return {ROWS_FILE: str(path)}, take


def pytest_terminal_summary(terminalreporter):
    cells = defaultdict(list)
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []):
                if name == COVERS:
                    cells[tuple(json.loads(value))].append(outcome)
                elif name == "covered":
                    *cell, results = json.loads(value)
                    cells[tuple(cell)] += results
    if path := os.environ.get(ROWS_FILE):
        Path(path).write_text("".join(json.dumps([*cell, found]) + "\n" for cell, found in cells.items()))
    elif cells:
        terminalreporter.section("host x trainer x configuration")
        console = Console(width=220)
        with console.capture() as captured:
            console.print(table(cells))
        terminalreporter.write_line(captured.get())


def table(cells):
    made = Table("host", "trainer", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        made.add_column(name.replace(" ", "\n"), no_wrap=True)
    for host, trainer in sorted({(host, trainer) for host, trainer, _ in cells}):
        made.add_row(host, trainer, *(said(cells.get((host, trainer, name), []), name) for name in COLUMNS))
    return made


def said(outcomes, name):
    if any(outcome != "passed" for outcome in outcomes):
        return "FAILED"
    return "" if not outcomes else "refused" if name in REFUSED else "ok"
