"""Settings of the whole suite, and what a run leaves: a table host x trainer x configuration, or its results."""

from __future__ import annotations

import gc
import json
import os
import socket
from collections import defaultdict
from pathlib import Path

# Read when the libraries are imported, here and in every process that a test starts.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # these tensors are tiny: a second thread only waits for the first

# Each worker has a port of its own for the engines and process groups that its tests start: all would take 29500.
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    os.environ["MASTER_PORT"] = str(probe.getsockname()[1])

import pytest
from matrix import COLUMNS
from summary import RESULT_FILE, table

from kl_plugins.patching.versions import installed_version

COVERS = "covers"


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


def pytest_collection_modifyitems(items):
    """Files that start engines first, then other slow ones: the small ones fill what is left of both workers' time."""
    weight: dict[Path, int] = {}
    for item in items:
        own = 2 if item.get_closest_marker("vllm") else 1 if item.get_closest_marker("slow") else 0
        weight[item.path] = max(own, weight.get(item.path, 0))
    items.sort(key=lambda item: -weight[item.path])


def pytest_configure(config):
    if RESULT_FILE in os.environ:
        config.option.durations = None  # who reads the file shows those of all its runs


def pytest_terminal_summary(terminalreporter):
    cells, durations = defaultdict(list), []
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            if not hasattr(report, "duration"):  # a module that could not be imported
                continue
            durations.append((report.duration, f"{report.when} of {report.nodeid}"))
            for name, value in report.user_properties:
                if name == COVERS:
                    cells[tuple(json.loads(value))].append(outcome)
    for report in terminalreporter.stats.get("", []):  # set-ups and tear-downs that went well
        durations.append((report.duration, f"{report.when} of {report.nodeid}"))
    if path := os.environ.get(RESULT_FILE):
        found = {"trl": installed_version("trl"), "passed": len(terminalreporter.stats.get("passed", []))}
        found |= {"cells": [[*cell, outcomes] for cell, outcomes in cells.items()], "durations": durations}
        Path(path).write_text(json.dumps(found))
    elif cells:
        terminalreporter.section("host x trainer x configuration")
        terminalreporter.write_line(table(cells))
