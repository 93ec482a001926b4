"""Clusters on which a process can't be hooked: the run stops, and says why."""

from __future__ import annotations

import pytest
from openrlhf_run import run

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]

# What a node of a cluster can look like to its workers; by the user's own hook, which is chained before ours.
HOOKS = """
def no_package(runtime_env):
    return _with(runtime_env, "NO_PACKAGE")

def no_patches(runtime_env):
    return _with(runtime_env, "NO_PATCHES")

def _with(runtime_env, what):
    runtime_env = dict(runtime_env or {})
    return runtime_env | {"env_vars": runtime_env.get("env_vars", {}) | {what: "1"}}
"""
SITE = """
import os, sys

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "kl_plugins":
            raise ModuleNotFoundError(f"No module named {name!r}")

if os.environ.get("NO_PACKAGE"):
    sys.meta_path.insert(0, NoPackage())
if os.environ.get("NO_PATCHES"):
    import kl_plugins.patching
    kl_plugins.patching.Patching.apply_on_import = lambda self: None
"""


def run_with(tmp_path, model_folder, hook):
    """A run whose workers start with `SITE`, in the place of the `sitecustomize` that the shim's own one runs next."""
    (tmp_path / "cluster_hooks.py").write_text(HOOKS)
    (tmp_path / "sitecustomize.py").write_text(SITE)
    return run(
        tmp_path,
        model_folder,
        *("grpo", "--kl", "k2_as_loss"),
        PYTHONPATH=str(tmp_path),
        RAY_RUNTIME_ENV_HOOK=f"cluster_hooks.{hook}",
    )


def test_a_node_without_the_package_stops_the_run_and_is_named(tmp_path, model_folder):
    refused = run_with(tmp_path, model_folder, "no_package")
    assert refused.returncode not in (0, -1)
    assert "No module named 'kl_plugins'" in refused.output
    assert not refused.steps


@pytest.mark.extra
def test_a_process_that_was_never_hooked_does_not_train(tmp_path, model_folder):
    refused = run_with(tmp_path, model_folder, "no_patches")
    assert refused.returncode not in (0, -1)
    assert "Unknown kl_estimator: kl_plugins:k2_as_loss" in refused.output
    assert not refused.steps
    assert not list(refused.folder.rglob("model.safetensors"))
