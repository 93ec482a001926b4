"""In every Ray worker process: the host's functions are replaced as they are imported, and the process reports on it.

Reports go to Ray's own key-value store, where the controller finds those of all nodes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from importlib import import_module
from io import StringIO
from typing import Any

from kl_plugins.errors import PatchError
from kl_plugins.openrlhf.plan import Plan, RunPlan
from kl_plugins.patching import Patching, load_patches, untested_allowed

SETUP_HOOK = "kl_plugins.openrlhf.worker.setup"
# Set for workers (and what they start): a hook of the user that is run after ours, and the sign that this is a worker.
CHAINED_SETUP_HOOK = "KL_PLUGINS_CHAINED_SETUP_HOOK"
IN_WORKER = "KL_PLUGINS_IN_WORKER"

_ACTOR = "openrlhf.trainer.ray.ppo_actor"
_EXPERIENCE = "openrlhf.trainer.ppo_utils.experience_maker"
_SAMPLES = "openrlhf.trainer.ppo_utils.samples_generator"
_NAMESPACE = b"kl_plugins"

_patching: Patching | None = None


def patching() -> Patching:
    """The patches of this process, made on first use."""
    global _patching
    if _patching is None:
        _patching = Patching(load_patches("openrlhf"), allow_untested=untested_allowed())
    return _patching


def setup() -> None:
    """Have the functions of OpenRLHF that `patches/openrlhf.toml` names replaced, each as soon as it is imported.

    Ray calls it, as its `worker_process_setup_hook`, in every worker process before that imports anything of OpenRLHF;
    a hook of the user's own (`KL_PLUGINS_CHAINED_SETUP_HOOK`) is run after it. `PatchError`, at the import, for a
    function that isn't as it was tested.
    """
    patching().apply_on_import()
    chained = os.environ.get(CHAINED_SETUP_HOOK)
    if chained:
        resolve(chained)()


def resolve(path: str) -> Any:
    """The object that `module.name` names, as Ray spells its hooks."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def report() -> None:
    """Publish which of our functions are bound in this process and how often each was called.

    They go into Ray's key-value store, under this job, node and process. Outside of Ray it does nothing.
    """
    import ray
    from ray.experimental.internal_kv import _internal_kv_put

    if _patching is None or not ray.is_initialized():
        return
    context = ray.get_runtime_context()
    process = {
        "process": (context.get_task_name() or "").partition(".")[0],  # the actor's class
        "node": ray.util.get_node_ip_address(),
        "pid": os.getpid(),
        "bindings": [asdict(binding) for binding in _patching.bindings()],
    }
    key = f"{context.get_job_id()}/{process['node']}/{process['pid']}"
    _internal_kv_put(key, json.dumps(process), overwrite=True, namespace=_NAMESPACE)


def reports() -> list[dict[str, Any]]:
    """What the processes of this job have published: for each its actor class, node, pid and bindings."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

    keys = _internal_kv_list(f"{ray.get_runtime_context().get_job_id()}/", namespace=_NAMESPACE)
    return [json.loads(_internal_kv_get(key, namespace=_NAMESPACE)) for key in sorted(keys)]


def require_proof(plan: RunPlan, *, actors: int) -> None:
    """Print in which processes our functions were called.

    Raises `PatchError`, with that table, unless each of the `actors` policy processes, and whoever else has to by
    `plan`, has called ours.
    """
    found = reports()
    table = proof_table(found)
    problems = missing_proof(found, plan, actors=actors)
    if problems:
        raise PatchError("\n".join([*problems, table]))
    print(table, flush=True)


def missing_proof(found: Iterable[dict[str, Any]], plan: RunPlan, *, actors: int) -> list[str]:
    """One sentence for each function of ours that too few processes have called; none if the plan was followed."""
    needed = {
        f"{_ACTOR}:ActorPPOTrainer.training_step": actors,
        f"{_ACTOR}:compute_approx_kl": 0 if plan.in_reward else actors,
        f"{_EXPERIENCE}:compute_approx_kl": 1 if plan.in_reward else 0,
        f"{_SAMPLES}:SamplesGenerator._dispatch_prompts_to_vllm": int(isinstance(plan, Plan)),
    }
    bindings = [binding for process in found for binding in process["bindings"]]
    asked = "trains without the KL that was asked for" if isinstance(plan, Plan) else "isn't watched"
    problems = []
    for target, processes in needed.items():
        called = sum(b["target"] == target and b["bound"] and b["calls"] > 0 for b in bindings)
        if called < processes:
            problems.append(
                f"after the first step, {target} of kl_plugins should have been called in {processes} "
                f"process{'es' * (processes > 1)}, found {called}: part of the run {asked}; is the "
                "same kl_plugins installed on every node?"
            )
    return problems


def proof_table(found: Iterable[dict[str, Any]]) -> str:
    """The reports as text: one line for each hooked function of each process that called one."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title="kl_plugins: the KL of this run, by process", box=box.ASCII2, title_justify="left")
    for column in ("process", "node", "pid", "role", "target", "host", "digest", "calls"):
        table.add_column(column, no_wrap=True, justify="right" if column in ("pid", "calls") else "left")
    for process in found:
        for b in process["bindings"]:
            if b["bound"] and b["calls"]:
                cells = (process["process"], process["node"], process["pid"], b["role"], b["target"].split(":")[1])
                table.add_row(*map(str, cells), f"{b['host']} {b['version']}", b["digest"][:8], str(b["calls"]))
    console = Console(file=StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]
