"""Runs pytest under several versions of TRL, and what comes of it in one table: host x trainer x configuration.

usage: python tests/support/suites.py test [PYTEST'S ARGUMENTS]    `make test`
       python tests/support/suites.py all [PYTEST'S ARGUMENTS]     `make test-all`
       python tests/support/suites.py matrix                       `make matrix`

`test` and `all` run the whole suite under the TRL of this environment and, one after the other beside it, parts of it
under other versions; with arguments, which name tests, only the former. Exits with 1 if anything failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from summary import RESULT_FILE, slowest, table
from trl_versions import environment

from kl_plugins.patching import load_patches
from kl_plugins.patching.versions import installed_version

ROOT = Path(__file__).resolve().parents[2]
# Whole files go to the workers, those first that start engines (tests/conftest.py).
IN_PARALLEL = ["-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
ALONE = ["-W", "ignore", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
OLDER = ("term", "config", "identity", "exact", "every_configuration", "apply", "drift", "launcher")
GRPO = tuple(f"tests/trl/test_{name}.py" for name in OLDER)
# PPO, which TRL dropped after 1.12, and GRPO with RLOO: the releases that are said to be tested, the oldest first.
PPO_VERSIONS = load_patches("trl", "ppo").tested
GRPO_VERSIONS = [version for version in load_patches("trl", "grpo").tested if version != installed_version("trl")]


@dataclass(frozen=True)
class Suite:
    """One run of pytest under one TRL. `version`: None for the TRL of this environment."""

    name: str
    tests: tuple[str, ...]
    version: str | None = None
    least: int = 0  # tests that must have passed

    def run(self, result: Path, *, live: bool = False) -> tuple[int, str]:
        """Its exit status and what it printed; `live`: on the terminal instead. Its results go into the file."""
        try:
            variables = environment(self.version) if self.version else dict(os.environ)
        except RuntimeError as error:
            return 1, str(error)
        options = IN_PARALLEL if live else ALONE
        done = subprocess.run(
            [sys.executable, *options, *self.tests],
            env=variables | {RESULT_FILE: str(result)},
            cwd=ROOT,
            stdout=None if live else subprocess.PIPE,
            stderr=None if live else subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout or ""

    def problem(self, status: int, found: dict) -> str:
        """Why it counts as failed, or nothing."""
        if status:
            return f"pytest ended with {status}"
        if self.version and found["trl"] != self.version:
            return f"it ran under TRL {found['trl']}"
        return "" if found["passed"] >= self.least else f"only {found['passed']} tests passed"


def ppo(version: str) -> Suite:
    """PPO's tests under a TRL that has a PPOTrainer."""
    return Suite(f"PPO, TRL {version}", ("tests/ppo",), version, least=100)


def grpo(version: str) -> Suite:
    """The tests of GRPO's and RLOO's term, refusals and identity under an older TRL."""
    return Suite(f"GRPO and RLOO, TRL {version}", GRPO, version, least=100)


ALL = [*map(grpo, GRPO_VERSIONS), *map(ppo, PPO_VERSIONS)]
FEW = [grpo(GRPO_VERSIONS[0]), ppo(PPO_VERSIONS[-1]), ppo(PPO_VERSIONS[0])]


def main(mode: str, *arguments: str) -> int:
    marks = ["-m", "not extra"] if mode == "test" else []
    whole = [] if mode == "matrix" else [Suite("all", (*marks, *arguments))]
    others = {"test": FEW, "all": ALL, "matrix": ALL}[mode] if not arguments or mode == "matrix" else []
    problems, cells, durations = {}, defaultdict(list), []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1 if whole else 2) as pool:
        results = {suite: Path(folder, f"{number}.json") for number, suite in enumerate([*whole, *others])}
        running = {suite: pool.submit(suite.run, results[suite]) for suite in others}
        ended = {suite: suite.run(results[suite], live=True) for suite in whole}
        for suite in [*whole, *others]:
            status, printed = ended.get(suite) or running[suite].result()
            found = json.loads(results[suite].read_text()) if results[suite].exists() else None
            problem = suite.problem(status, found) if found else f"pytest ended with {status} and left no results"
            if problem:
                problems[suite.name] = problem
                print(printed)
            if suite in others:
                print(f"{suite.name}: {problem or 'passed, ' + str(found['passed']) + ' tests'}", flush=True)
            for *cell, outcomes in (found or {}).get("cells", []):
                cells[tuple(cell)] += outcomes
            where = f"{suite.name}: " if suite in others else ""
            durations += [(seconds, where + test) for seconds, test in (found or {}).get("durations", [])]
    print(*([table(cells)] if cells else []), slowest(durations), sep="\n")
    for name, problem in problems.items():
        print(f"FAILED {name}: {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
