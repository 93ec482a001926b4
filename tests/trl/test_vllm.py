"""Real vLLM engines on the CPU: the sampler follows the policy, and its log-probs are the behavior policy's.

An engine takes 20 to 35 seconds to start, so the trainings share one, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
SUPPORT = Path(__file__).parents[1] / "support"
pytestmark = pytest.mark.vllm


def started(script, *arguments):
    """Run a script of tests/support in a process of its own, which has the engine."""
    path = os.pathsep.join([str(SUPPORT), *filter(None, sys.path)])
    env = dict(os.environ, OMP_NUM_THREADS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", PYTHONPATH=path)
    command = [sys.executable, str(SUPPORT / script), *map(str, arguments)]
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]


@pytest.fixture(scope="module")
def logged(model, tmp_path_factory):
    """Training -> the rows that it logged, of all the trainings in tests/support/vllm_run.py."""
    out = tmp_path_factory.mktemp("vllm") / "rows.json"
    started("vllm_run.py", model, out)
    return json.loads(out.read_text())


def test_a_tied_head_follows_too(tmp_path):
    started("vllm_tied.py", tmp_path)
    gaps = json.loads((tmp_path / "gaps.json").read_text())
    assert gaps["loaded"] < 0.02
    assert gaps["head not packed anew"] > 0.2  # the twin: the reload alone
    assert gaps["synced"] < 0.03


def mean(rows, name):
    return sum(row[name] for row in rows) / len(rows)


def test_the_sampler_follows_the_policy(logged):
    rows = logged["grpo"]
    assert len(rows) == 10
    assert mean(rows[-3:], "kl/k3") > 0.1  # the policy has left the reference, which is where the engine started
    assert max(row["sampling/sampling_logp_difference/mean"] for row in rows) < 0.02
    assert min(row["kl/ess"] for row in rows) > 0.99


def test_without_the_sync_it_does_not(logged):
    rows = logged["no_sync"]
    assert mean(rows[-3:], "kl/k3") > 0.1
    assert mean(rows[-3:], "sampling/sampling_logp_difference/mean") > 0.1
    assert mean(rows[-3:], "kl/ess") < 0.95  # the KL's weights are taken against the engine, and show it


def test_rloo_takes_the_engines_log_probs_too(logged):
    rows = logged["rloo"]
    assert mean(rows[-3:], "kl/k3") > 0.05
    # bf16 engine, float32 trainer: weights near 1 but never all exactly 1, as they would be against the old policy
    assert all(1 < row["kl/weight_max"] < 1.2 for row in rows)


def test_the_engines_gap_is_the_one_that_trl_logs(logged):
    """A real engine in bf16 under TRL's own GRPO: the gap at rollout, and ratios against the engine."""
    rows = logged["watched"]
    assert len(rows) == 4
    for row in rows[::2]:  # the steps with a rollout, of which TRL logs the gap
        assert row["kl/engine_gap"] == pytest.approx(row["sampling/sampling_logp_difference/mean"], rel=1e-5)
        assert row["kl/engine_gap_max"] == pytest.approx(row["sampling/sampling_logp_difference/max"], rel=1e-5)
        assert 0 < abs(row["kl/engine_k1"]) < row["kl/engine_gap"] < row["kl/engine_gap_max"]
        assert row["kl/ratio_ess"] > 0.99
        assert row["kl/engine_unscored"] == row["kl/ratio_unscored"] == 0
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["kl/engine_gap"] == second["kl/engine_gap"]  # of the same rollout
        assert second["kl/ratio_ess"] < first["kl/ratio_ess"]  # the policy has moved
