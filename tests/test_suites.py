"""The runner behind `make test` and `make matrix`: what counts as passed, and its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matrix import COLUMNS
from suites import ALL, FEW, Suite
from summary import RESULT_FILE, WIDTH, slowest, table

from kl_plugins.patching import load_patches
from kl_plugins.patching.versions import installed_version

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("status", "trl", "passed", "problem"),
    [
        (0, "1.12.0", 100, ""),
        (1, "1.12.0", 100, "pytest ended with 1"),
        (0, "1.16.0", 100, "it ran under TRL 1.16.0"),
        (0, "1.12.0", 99, "only 99 tests passed"),
    ],
)
def test_a_suite_counts_only_if_enough_passed_under_the_version_it_names(status, trl, passed, problem):
    suite = Suite("PPO", ("tests/ppo",), "1.12.0", least=100)
    assert suite.problem(status, {"trl": trl, "passed": passed}) == problem


def test_every_tested_version_is_in_the_matrix():
    here = installed_version("trl")
    wanted = {(part, v) for part in ("grpo", "ppo") for v in load_patches("trl", part).tested if v != here}
    found = {("ppo" if suite.tests == ("tests/ppo",) else "grpo", suite.version) for suite in ALL}
    assert found == wanted
    assert set(FEW) <= set(ALL)


def test_the_table_of_all_versions_fits_its_width():
    rows = [("openrlhf 0.11.2", "RemoteExperienceMaker"), ("trl 1.12.0", "GRPOTrainer"), ("trl 1.16.0", "RLOOTrainer")]
    cells = {(*row, name): ["passed"] for row in rows[:2] for name in COLUMNS}
    cells |= {(*rows[2], "k2_as_loss token"): ["passed", "failed"], (*rows[2], "k1_as_loss"): ["error"]}
    lines = table(cells).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "…" not in "".join(lines)
    (first, second, third) = [next(line for line in lines if row[0] in line).split()[-12:] for row in rows]
    assert first == second == ["ok"] * 6 + ["-"] * 3 + ["ok"] * 3
    assert third.count("FAILED") == 2


def test_the_slowest():
    said = slowest([(1.0, "one"), (3.0, "three"), (2.0, "two")], count=2)
    assert said.splitlines()[1:] == ["   3.00 s  three", "   2.00 s  two"]


CASE = """
import pytest

@pytest.mark.parametrize("right", [True, False])
def test_it(covers, right):
    covers("trl", "GRPOTrainer", "k2_as_loss token")
    assert right
"""


def test_a_run_leaves_its_results_in_the_file(tmp_path):
    (tmp_path / "test_case.py").write_text(CASE)
    folders = (ROOT, ROOT / "tests", ROOT / "tests" / "support")
    env = {RESULT_FILE: str(tmp_path / "found.json"), "PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "conftest", "test_case.py"],
        env=os.environ | env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    trl = installed_version("trl")
    assert (found["trl"], found["passed"]) == (trl, 1)
    assert found["cells"] == [[f"trl {trl}", "GRPOTrainer", "k2_as_loss token", ["passed", "failed"]]]
    assert any(test.startswith("call of test_case.py::test_it") for _, test in found["durations"])
