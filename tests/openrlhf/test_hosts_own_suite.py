"""OpenRLHF's own tests of its KL, which come in its wheel, with the plugin loaded and idle."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path


def test_openrlhfs_own_kl_tests_pass_with_the_plugin_idle():
    suite = distribution("openrlhf").locate_file("tests/test_kl_estimator_gradient.py")
    support = Path(__file__).parents[1] / "support"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "idle_plugin", "-p", "no:cacheprovider", "-c", os.devnull]
    paths = os.pathsep.join(filter(None, (str(support), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*command, "--rootdir", str(Path(str(suite)).parent), str(suite)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
