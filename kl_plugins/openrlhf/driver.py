"""In the driver: the launcher, and the hook through which Ray's own `ray.init` lets us in.

    kl-plugins openrlhf --kl reverse_kl -- <train_ppo_ray flags>

    KL_PLUGINS_OPENRLHF="--kl reverse_kl" RAY_RUNTIME_ENV_HOOK=kl_plugins.openrlhf.driver.runtime_env_hook \\
        python -m openrlhf.cli.train_ppo_ray <flags>
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from kl_plugins.errors import ConfigError, PatchError
from kl_plugins.integration.flags import parse_flags
from kl_plugins.openrlhf import worker
from kl_plugins.openrlhf.plan import OpenRLHFOptions, Plan, RunPlan, check_options, plan_run
from kl_plugins.patching import ALLOW_UNTESTED, check, load_patches, untested_allowed

MODULE = "openrlhf.cli.train_ppo_ray"
HOOK = f"{__name__}.runtime_env_hook"
RAY_HOOK = "RAY_RUNTIME_ENV_HOOK"
# The options, in the words of `kl-plugins openrlhf`, for those who keep their own launch scripts.
OPTIONS = "KL_PLUGINS_OPENRLHF"
CHAINED_HOOK = "KL_PLUGINS_CHAINED_HOOK"

_plan: RunPlan | None = None
_options: OpenRLHFOptions | None = None
_dry_run = False


def launch(options: OpenRLHFOptions, flags: Sequence[str], *, dry_run: bool = False) -> None:
    """Run OpenRLHF's own `train_ppo_ray` with `flags` in this process, hooked.

    Raises `ConfigError`, `UnknownLossError` or `PatchError` before Ray starts if something doesn't fit; options that
    can't be what was meant are refused before Ray and OpenRLHF are imported. `dry_run` stops there in any case, after
    saying what would be done.
    """
    global _plan, _options, _dry_run
    if os.environ.get(OPTIONS):
        raise ConfigError(f"{OPTIONS} is set, and so are options of the launcher: keep one of the two")
    check_options(options)
    _plan, _options, _dry_run = None, options, dry_run
    _set_hook()
    import ray

    if ray.is_initialized():
        raise PatchError(
            "Ray is running in this process already, so its hook would not be called: ray.shutdown() first"
        )
    ray_init = ray.init

    def init(*args: Any, **kwargs: Any) -> Any:
        context = ray_init(*args, **kwargs)
        if not _planned():
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


def prepare(options: OpenRLHFOptions, args: Any) -> RunPlan:
    """Check a run and plan its KL, for scripts that call OpenRLHF's `train(args)` themselves: call this before.

    ```python
    from kl_plugins.openrlhf import OpenRLHFOptions
    from kl_plugins.openrlhf.driver import prepare

    prepare(OpenRLHFOptions(kl="reverse_kl"), args)
    train(args)
    ```

    It puts the plan into `args`, sets the KL flags of OpenRLHF there that fit it (`plan.plan_run`), and sets
    `RAY_RUNTIME_ENV_HOOK`, so that the `ray.init` in `train` hooks every worker process. `args` are OpenRLHF's own,
    parsed.

    Returns:
        The plan.

    Raises:
        ConfigError: For options or flags that contradict each other, all of them at once.
        UnknownLossError: For a `kl` that nobody registered.
        PatchError: For an OpenRLHF that isn't as it was tested.
    """
    global _plan
    check(load_patches("openrlhf"), allow_untested=untested_allowed())
    _plan = plan_run(options, args)
    _set_hook()
    return _plan


def _planned() -> bool:
    return _plan is not None


def _set_hook() -> None:
    previous = os.environ.get(RAY_HOOK)
    if previous and previous != HOOK:
        os.environ[CHAINED_HOOK] = previous
    os.environ[RAY_HOOK] = HOOK
    # Under `uv run` Ray would call its own hook instead of ours, which calls it in turn.
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"


def runtime_env_hook(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """Plan the KL of the main program's run, and have Ray hook every worker process that it starts.

    Ray calls what `RAY_RUNTIME_ENV_HOOK` names inside of `ray.init`, with the `runtime_env` of the job (None: none was
    given), before it starts a process. The options are those of `launch` or `prepare`, or the words in
    `KL_PLUGINS_OPENRLHF`.

    Returns:
        The `runtime_env` with `worker.setup` as its `worker_process_setup_hook`; one that was there runs after it.

    Raises:
        ConfigError, UnknownLossError: For options or flags that can't be, or no option at all.
        PatchError: For an OpenRLHF that isn't as it was tested, or a main program that isn't OpenRLHF's and did not
            call `prepare`.
    """
    runtime_env = dict(_chained(runtime_env) or {})
    args = _arguments_of_main()
    if args is None and os.environ.get(worker.IN_WORKER):  # vLLM's own ray.init, which inherits our variables
        return runtime_env
    if _plan is None or (args is not None and getattr(args, "kl_plugins", None) is not _plan):
        if args is None:
            raise PatchError(
                f"{RAY_HOOK} names kl_plugins, but the main program ({_main()}) is not {MODULE}, whose arguments were "
                "expected: call kl_plugins.openrlhf.driver.prepare(options, args) before train(args)"
            )
        prepare(_options or options_from_words(os.environ.get(OPTIONS, "")), args)
    assert _plan is not None
    print(describe(_plan), flush=True)
    if _dry_run:
        raise SystemExit(0)
    env_vars = {**runtime_env.get("env_vars", {}), worker.IN_WORKER: "1"}
    if untested_allowed():
        env_vars[ALLOW_UNTESTED] = "1"
    theirs = runtime_env.get("worker_process_setup_hook")
    if theirs is not None and not isinstance(theirs, str):
        raise ConfigError(
            f"worker_process_setup_hook={theirs!r} is a function, which can't be chained: name it as 'module.function'"
        )
    if theirs and theirs != worker.SETUP_HOOK:
        env_vars[worker.CHAINED_SETUP_HOOK] = theirs
    return {**runtime_env, "env_vars": env_vars, "worker_process_setup_hook": worker.SETUP_HOOK}


def options_from_words(words: str) -> OpenRLHFOptions:
    """The options in the words of the launcher: `"--kl k2_as_loss --kl-off-policy token"`.

    Raises `ConfigError` for words that are no options, or none at all.
    """
    if not words.strip():
        raise ConfigError(f'{RAY_HOOK} names kl_plugins, but no KL was chosen: set {OPTIONS}="--kl reverse_kl"')
    options: OpenRLHFOptions = parse_flags(words, OpenRLHFOptions, of=OPTIONS)
    return options


def describe(plan: RunPlan) -> str:
    """What is printed when a run starts: its KL, where it goes, its gradient, what biases it, and what is watched."""
    lines = _what_is_computed(plan) if isinstance(plan, Plan) else ["OpenRLHF's own KL stays as it is"]
    if plan.monitor:
        lines.append(f"watched: the KL in the {_where(plan)}; its numbers are logged as kl/*")
        lines.append("no kl/gradient_ratio: DeepSpeed splits or gathers the gradients in its own backward pass")
        lines += ["no kl/dead: the KL is in the reward, not in the loss"] if plan.in_reward else []
    return "\n".join(f"[kl_plugins {plan.version}] {line}" for line in lines)


def _where(plan: RunPlan) -> str:
    return "reward" if plan.in_reward else "loss"


def _what_is_computed(plan: Plan) -> list[str]:
    spec = plan.spec
    how = "OpenRLHF's own ratio and clip" if plan.in_reward else f"off_policy={spec.off_policy}"
    biased = " (allowed by kl_allow_biased)" if spec.gradient_of in ("zero", "biased") else ""
    return [
        *([plan.picked] if plan.picked else []),
        f"{spec.name} in the {_where(plan)}: credit={spec.credit}, {how}, baseline={spec.baseline}",
        f"expected gradient: {spec.gradient_of}{biased}",
        *(f"BIASED (allowed by kl_allow_biased): {problem}" for problem in plan.waived),
    ]


def _chained(runtime_env: dict[str, Any] | None) -> dict[str, Any] | None:
    from ray._private.runtime_env.uv_runtime_env_hook import _get_uv_run_cmdline, hook

    theirs = os.environ.get(CHAINED_HOOK)
    if theirs:
        runtime_env = worker.resolve(theirs)(runtime_env)
    return hook(runtime_env) if _get_uv_run_cmdline() else runtime_env


def _arguments_of_main() -> Any:
    """The parsed arguments that OpenRLHF's main module holds as `args`; None in any other program."""
    args = getattr(sys.modules["__main__"], "args", None)
    return None if getattr(getattr(args, "algo", None), "kl", None) is None else args


def _main() -> str:
    return str(getattr(sys.modules["__main__"], "__file__", "an interactive session"))
