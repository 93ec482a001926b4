"""In the driver: the launcher, and the hook through which Ray's own `ray.init` lets us in.

    kl-plugins openrlhf --kl k2_as_loss -- <train_ppo_ray flags>

    KL_PLUGINS_OPENRLHF="--kl k2_as_loss" RAY_RUNTIME_ENV_HOOK=kl_plugins.openrlhf.driver.runtime_env_hook \\
        python -m openrlhf.cli.train_ppo_ray <flags>
"""

from __future__ import annotations

import os
import runpy
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from kl_plugins.errors import ConfigError, PatchError
from kl_plugins.openrlhf import worker
from kl_plugins.openrlhf.plan import OpenRLHFOptions, Plan, plan_run
from kl_plugins.patchfile import load_patches
from kl_plugins.patching import check

MODULE = "openrlhf.cli.train_ppo_ray"
HOOK = f"{__name__}.runtime_env_hook"
RAY_HOOK = "RAY_RUNTIME_ENV_HOOK"
# The options, in the words of `kl-plugins openrlhf`, for those who keep their own launch scripts.
OPTIONS = "KL_PLUGINS_OPENRLHF"
CHAINED_HOOK = "KL_PLUGINS_CHAINED_HOOK"

_plan: Plan | None = None
_options: OpenRLHFOptions | None = None
_dry_run = False


def launch(options: OpenRLHFOptions, flags: Sequence[str], *, dry_run: bool = False) -> None:
    """Run OpenRLHF's own `train_ppo_ray` with `flags` in this process, hooked.

    Raises `ConfigError`, `UnknownLossError` or `PatchError` before Ray starts if something doesn't fit. `dry_run`
    stops there in any case, after saying what would be done.
    """
    global _options, _dry_run
    _options, _dry_run = options, dry_run
    previous = os.environ.get(RAY_HOOK)
    if previous and previous != HOOK:
        os.environ[CHAINED_HOOK] = previous
    os.environ[RAY_HOOK] = HOOK
    # Under `uv run` Ray would call its own hook instead of ours, which calls it in turn.
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    import ray

    ray_init = ray.init

    def init(*args: Any, **kwargs: Any) -> Any:
        context = ray_init(*args, **kwargs)
        if _plan is None:
            raise PatchError(
                f"ray.init did not call {RAY_HOOK} (a Ray client address, ray://, doesn't): no process would be "
                "hooked; start it on the cluster, e.g. with `ray job submit -- kl-plugins openrlhf ...`"
            )
        return context

    ray.init = init
    sys.argv = [MODULE, *flags]
    try:
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
    finally:
        ray.init = ray_init


def prepare(options: OpenRLHFOptions, args: Any) -> Plan:
    """For scripts that call OpenRLHF's `train(args)` themselves: call this before. Raises as `launch` does."""
    global _plan
    check(load_patches("openrlhf"), allow_untested=worker.allow_untested())
    _plan = plan_run(options, args)
    os.environ[RAY_HOOK] = HOOK
    return _plan


def runtime_env_hook(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """`RAY_RUNTIME_ENV_HOOK`: `ray.init` calls it with the runtime_env of the job, before it starts anything."""
    runtime_env = dict(_chained(runtime_env) or {})
    if os.environ.get(worker.IN_WORKER):  # what a worker starts (vLLM's own ray.init) inherits our variables
        return runtime_env
    if _plan is None:
        prepare(_options or options_from_words(os.environ.get(OPTIONS, "")), _arguments_of_main())
    assert _plan is not None
    print(describe(_plan), flush=True)
    if _dry_run:
        raise SystemExit(0)
    env_vars = {**runtime_env.get("env_vars", {}), worker.IN_WORKER: "1"}
    if worker.allow_untested():
        env_vars[worker.ALLOW_UNTESTED] = "1"
    theirs = runtime_env.get("worker_process_setup_hook")
    if theirs is not None and not isinstance(theirs, str):
        raise ConfigError(
            f"worker_process_setup_hook={theirs!r} is a function, which can't be chained: name it as 'module.function'"
        )
    if theirs and theirs != worker.SETUP_HOOK:
        env_vars[worker.CHAINED_SETUP_HOOK] = theirs
    return {**runtime_env, "env_vars": env_vars, "worker_process_setup_hook": worker.SETUP_HOOK}


def options_from_words(words: str) -> OpenRLHFOptions:
    """The options in the words of the launcher: `"--kl k2_as_loss --kl-off-policy token"`."""
    from kl_plugins.cli import UsageError, openrlhf_command

    if not words.strip():
        raise ConfigError(f'{RAY_HOOK} names kl_plugins, but no KL was chosen: set {OPTIONS}="--kl k2_as_loss"')
    try:
        context = openrlhf_command().make_context(OPTIONS, shlex.split(words))
    except UsageError as error:
        raise ConfigError(f"{OPTIONS}={words!r}: {error.format_message()}") from error
    if context.args or context.params["dry_run"]:
        raise ConfigError(f"{OPTIONS}={words!r}: only options of the KL belong here")
    return OpenRLHFOptions(**{name: value for name, value in context.params.items() if name.startswith("kl")})


def describe(plan: Plan) -> str:
    """Two lines: what is computed, where, and whose gradient it is."""
    spec = plan.spec
    where = "reward" if plan.in_reward else "loss"
    how = "OpenRLHF's own ratio and clip" if plan.in_reward else f"off_policy={spec.off_policy}"
    biased = " (allowed by kl_allow_biased)" if spec.gradient_of in ("zero", "biased") else ""
    return (
        f"[kl_plugins {plan.version}] {spec.name} in the {where}: credit={spec.credit}, {how}, "
        f"baseline={spec.baseline}\n"
        f"[kl_plugins {plan.version}] expected gradient: {spec.gradient_of}{biased}"
    )


def _chained(runtime_env: dict[str, Any] | None) -> dict[str, Any] | None:
    from ray._private.runtime_env.uv_runtime_env_hook import _get_uv_run_cmdline, hook

    theirs = os.environ.get(CHAINED_HOOK)
    if theirs:
        runtime_env = worker.resolve(theirs)(runtime_env)
    return hook(runtime_env) if _get_uv_run_cmdline() else runtime_env  # type: ignore[no-any-return]


def _arguments_of_main() -> Any:
    """The parsed arguments of `python -m openrlhf.cli.train_ppo_ray`, which its main module holds as `args`."""
    main = sys.modules["__main__"]
    args = getattr(main, "args", None)
    if getattr(getattr(args, "algo", None), "kl", None) is None:
        raise PatchError(
            f"{RAY_HOOK} names kl_plugins, but the main program ({getattr(main, '__file__', '?')}) is not "
            f"{MODULE}, whose arguments were expected: call kl_plugins.openrlhf.driver.prepare(options, args) before "
            "train(args)"
        )
    return args
