"""TRL dropped its PPOTrainer after 1.12: the tests in `tests/ppo` run under other versions of TRL than this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from trl_versions import environment

from kl_plugins.patching import load_patches
from kl_plugins.patching.versions import installed_version

TESTED = load_patches("trl", "ppo").tested
NEWEST, OLDEST = TESTED[-1], TESTED[0]

pytestmark = [
    pytest.mark.skipif(installed_version("trl") in TESTED, reason="this TRL has a PPOTrainer: tests/ppo runs here"),
    pytest.mark.timeout(900),  # a whole suite in one test
]


def run(version, *arguments, **variables):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(version) | variables,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )


def suite(version, rows_of):
    variables, take_rows = rows_of
    pytest_here = ("-W", "ignore", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist")
    done = run(version, *pytest_here, "tests/ppo", **variables)
    take_rows()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"trl {version}" in done.stdout  # the header says under which TRL it ran
    assert " passed" in done.stdout


@pytest.mark.slow
def test_ppo_under_the_newest_trl_that_has_it(rows_of):
    suite(NEWEST, rows_of)


@pytest.mark.slow
def test_ppo_under_the_oldest_tested_trl(rows_of):
    suite(OLDEST, rows_of)


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize("version", TESTED[1:-1])
def test_ppo_under_every_other_tested_trl(version, rows_of):
    suite(version, rows_of)


def test_this_trl_has_no_ppo_and_says_what_to_install():
    with pytest.raises(RuntimeError, match=f"TRL dropped it after {NEWEST}; install trl=={NEWEST}"):
        import kl_plugins.trl.ppo  # noqa: F401
