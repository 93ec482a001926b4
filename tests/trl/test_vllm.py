"""Real vLLM engines on the CPU: the sampler follows the policy, and its log-probs are the behavior policy's.

An engine lives as long as its process, so each case is a script of its own (20-35 s to start).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
SCRIPT = Path(__file__).parents[1] / "support" / "vllm_run.py"
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """`run("grpo")`: the logged rows of 10 steps with a real engine, computed once a module."""
    done: dict[str, list[dict]] = {}

    def run(case: str) -> list[dict]:
        if case not in done:
            out = tmp_path_factory.mktemp(case) / "rows.json"
            env = dict(os.environ, OMP_NUM_THREADS="1")
            env["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), *filter(None, sys.path)])
            ran = subprocess.run(
                [sys.executable, str(SCRIPT), case, model, str(out)], env=env, capture_output=True, text=True
            )
            assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
            done[case] = json.loads(out.read_text())
        return done[case]

    return run


def mean(rows, name):
    return sum(row[name] for row in rows) / len(rows)


def test_the_sampler_follows_the_policy(run):
    rows = run("grpo")
    assert len(rows) == 10
    assert mean(rows[-3:], "kl/k3") > 0.1  # the policy has left the reference, which is where the engine started
    assert max(row["sampling/sampling_logp_difference/mean"] for row in rows) < 0.02
    assert min(row["kl/ess"] for row in rows) > 0.99


def test_without_the_sync_it_does_not(run):
    rows = run("no_sync")
    assert mean(rows[-3:], "kl/k3") > 0.1
    assert mean(rows[-3:], "sampling/sampling_logp_difference/mean") > 0.1
    assert mean(rows[-3:], "kl/ess") < 0.95  # the KL's weights are taken against the engine, and show it


def test_rloo_takes_the_engines_log_probs_too(run):
    rows = run("rloo")
    assert mean(rows[-3:], "kl/k3") > 0.05
    # bf16 engine, float32 trainer: weights near 1 but never all exactly 1, as they would be against the old policy
    assert all(1 < row["kl/weight_max"] < 1.2 for row in rows)
