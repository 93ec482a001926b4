"""`ray job submit` to a cluster that is there already: the launcher as the job, and the environment alone."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time

import pytest
from openrlhf_run import REPOSITORY, Run, end, environment, ray_folder, run_stock

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.extra, pytest.mark.timeout(900)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, model_folder):
    """A head node with a dashboard, which job submission goes through; its address."""
    folder = tmp_path_factory.mktemp("cluster")
    dashboard = free_port()
    with ray_folder() as temporary, (folder / "head.log").open("w") as log:
        env = environment(folder, model_folder) | {"RAY_TMPDIR": temporary, "RAY_worker_niceness": "0"}
        env["PYTHONPATH"] = str(REPOSITORY / "recipes" / "openrlhf_cpu")
        env["RAY_OVERRIDE_RESOURCES"] = '{"CPU": 32, "GPU": 16}'
        command = ["ray", "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}"]
        head = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(120):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                        break
                time.sleep(1)
            yield f"http://127.0.0.1:{dashboard}", env
        finally:
            end(head)


def flags_of_the_recipe(tmp_path, model_folder):
    """The flags that the recipe would start OpenRLHF with, and the environment that it does so in."""
    printed = run_stock(tmp_path, model_folder, "grpo", only_print=True)
    return printed.output.split("\0")[:-1]


@pytest.mark.parametrize("by", ["launcher", "environment"])
def test_a_submitted_job_is_hooked(cluster, tmp_path, model_folder, by):
    address, env = cluster
    flags = flags_of_the_recipe(tmp_path, model_folder)
    names = ("PYTHONPATH", "PATH", "RAY_OVERRIDE_RESOURCES", "VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE")
    variables = {name: env[name] for name in names if name in env} | {
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }
    entry = ["kl-plugins", "openrlhf", "--kl", "k2_as_loss", "--", *flags]
    if by == "environment":
        variables["KL_PLUGINS_OPENRLHF"] = "--kl k2_as_loss"
        variables["RAY_RUNTIME_ENV_HOOK"] = "kl_plugins.openrlhf.driver.runtime_env_hook"
        entry = ["python", "-m", "openrlhf.cli.train_ppo_ray", *flags]
    submit = ["ray", "job", "submit", "--address", address, "--runtime-env-json", json.dumps({"env_vars": variables})]
    done = subprocess.run(
        [*submit, "--", *entry], env=os.environ | env, capture_output=True, text=True, timeout=600, check=False
    )
    job = Run(done.returncode, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr), tmp_path)
    assert job.returncode == 0, job.output[-3000:]
    assert any(row["target"] == "compute_approx_kl" for row in job.proof())
    assert "kl/k2" in job.steps[-1]
