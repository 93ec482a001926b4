"""GRPO and RLOO on the older TRL releases that are said to be tested: their term, their refusals, their identity."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from trl_versions import environment

from kl_plugins.patching import load_patches
from kl_plugins.patching.versions import installed_version

SUITE = ("term", "config", "identity", "exact", "every_configuration", "apply", "drift", "command")
OLDEST, *BETWEEN = [version for version in load_patches("trl", "grpo").tested if version != installed_version("trl")]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a whole suite in one test


def suite(version, rows_of):
    variables, take_rows = rows_of
    pytest_here = [sys.executable, "-W", "ignore", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*pytest_here, *(f"tests/trl/test_{name}.py" for name in SUITE)],
        env=environment(version) | variables,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    take_rows()
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 100
    asked = [sys.executable, "-c", "from kl_plugins.patching.versions import installed_version as v; print(v('trl'))"]
    found = subprocess.run(asked, env=environment(version), capture_output=True, text=True, check=True)
    assert found.stdout.strip() == version


def test_the_oldest_trl(rows_of):
    suite(OLDEST, rows_of)


@pytest.mark.extra
@pytest.mark.parametrize("version", BETWEEN)
def test_those_in_between(version, rows_of):
    suite(version, rows_of)
