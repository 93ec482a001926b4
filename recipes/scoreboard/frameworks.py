"""The frameworks of the scoreboard: their real functions as subjects of `kl_plugins.conformance`, and how to get them.

A framework that is installed is imported as it is; others can be put, without their dependencies, into a folder each
(`scoreboard.py --install`), together with the few packages that importing the function needs. Where the
`__init__` of a package wants a GPU or another Python, it is left out and only the module with the function is run.
"""

from __future__ import annotations

import os
import sys
import tempfile
import types
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kl_plugins.conformance import hosts
from kl_plugins.conformance.hosts import Term, in_loss, in_reward, of_mean_loss
from kl_plugins.conformance.subject import Scored, Subject, from_spec
from kl_plugins.core.registry import all_losses
from kl_plugins.core.spec import KLSpec

UNBOUNDED = (0.0, float("inf"))


@dataclass(frozen=True, kw_only=True)
class Framework:
    """A framework, how its functions are got at, and what installing them takes."""

    name: str
    distribution: str
    """The distribution whose version is shown."""
    entries: Callable[[], list[Term]]
    requires: tuple[str, ...] = ()
    """What `--install` puts into its folder, without dependencies. Empty: it comes with kl_plugins' own extras."""
    bare: tuple[str, ...] = ()
    """Packages whose `__init__` is not run."""
    hidden: tuple[str, ...] = ()
    """Modules that are made to look absent, because the framework wants another version of them."""
    paths: tuple[str, ...] = (".",)
    """Folders within its own that modules are imported from."""
    environment: tuple[tuple[str, str], ...] = ()
    note: str = ""
    """How it is run, where that differs from importing and calling it."""


def prepare(framework: Framework, folder: Path | None) -> None:
    """Make the framework importable in this process, which should import no other."""
    os.environ.update(framework.environment)
    for name in framework.hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    if folder is None:
        return
    sys.path[:0] = [str(folder / path) for path in framework.paths]
    for name in framework.bare:
        module = types.ModuleType(name)
        module.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = module


def ours() -> list[Term]:
    """Every configuration of kl_plugins that is not refused, with each kind of credit.

    Each with its default weights, bounds included; where those don't remove all of the bias, also with the ones that
    do, unbounded. What is in the reward also with the leave-one-out baseline.
    """
    found = []
    for name, loss in all_losses().items():
        for credit in loss.gradient_of:
            spec = KLSpec(name=name, credit=credit, allow_biased=True)
            if spec.gradient_of in ("zero", "biased"):
                continue
            kinds: list[dict[str, Any]] = [{}, {"off_policy": _whole(credit), "weight_clip": UNBOUNDED}]
            if loss.in_reward and credit != "token":
                kinds.insert(1, {"baseline": "leave_one_out"})
            found += [_own(name, credit, options) for options in kinds]
    return found


def _whole(credit: str) -> str:
    return "sequence" if credit == "sequence" else "prefix"


def _own(name: str, credit: str, options: dict[str, Any]) -> Term:
    spec = KLSpec(name=name, credit=credit, **options)
    words = [f"{name} {credit}", *(["leave-one-out"] if spec.baseline else [])]
    if options.get("off_policy"):
        words.append(f"{spec.off_policy} weights")
    return Term(
        subject=from_spec(spec, name=", ".join(words)),
        where="reward" if spec.loss.in_reward else "loss",
        default=not options and credit == spec.loss.default_credit,
        off_policy=spec.off_policy,
    )


def _skyrl() -> list[Term]:
    module = import_module("skyrl.backends.skyrl_train.utils.ppo_utils")
    how = "skyrl.backends.skyrl_train.utils.ppo_utils.compute_approx_kl"

    def asked(name: str) -> Callable[..., Tensor]:
        return lambda logp, ref_logp, mask: module.compute_approx_kl(logp, ref_logp, mask, name)

    found = [in_loss(k, asked(k), how, default=k == "k3") for k in ("k1", "abs", "k2", "k3")]
    return found + [in_reward(f"{k} in reward", asked(k), how) for k in ("k1", "k3")]


def _unsloth() -> list[Term]:
    module = import_module("unsloth_zoo.rl_replacements")

    def asked(corrected: bool) -> Subject:
        def mean_loss(scored: Scored, live: Tensor) -> Tensor:
            loss: Tensor = module.grpo_compute_loss(
                scored.ref_logp,
                live,
                scored.old_logp,
                scored.engine_logp,
                torch.zeros(live.shape, dtype=torch.long),
                scored.mask.long(),
                1.0,
                live.new_zeros(len(live)),
                loss_type="luspo",
                use_bias_correction_kl=corrected,
                use_vllm=scored.engine_logp is not None,
                vllm_importance_sampling_correction=scored.engine_logp is not None,
                vllm_importance_sampling_mode="token_truncate",
            )[0]
            return loss

        name = "GRPO (k3, bias correction)" if corrected else "GRPO (k3)"
        how = f"unsloth_zoo.rl_replacements.grpo_compute_loss, use_bias_correction_kl={corrected}, loss_type=luspo"
        return Subject(name=name, coefficient=of_mean_loss(mean_loss), knows_engine=True, origin=how)

    return [Term(subject=asked(True), where="loss", default=True), Term(subject=asked(False), where="loss")]


def _swift() -> list[Term]:
    trainer = import_module("swift.rlhf_trainers.grpo_trainer").GRPOTrainer
    batch_class = import_module("swift.rl_core.data").GRPOBatch
    same = {"gather": lambda x: x, "gather_for_metrics": lambda x: x, "reduce": lambda x, reduction: x}

    def asked(mode: str | None) -> Subject:
        def mean_loss(scored: Scored, live: Tensor) -> Tensor:
            stub = SimpleNamespace(
                model=SimpleNamespace(training=True),
                args=SimpleNamespace(top_entropy_quantile=1.0, log_entropy=False, delta=None),
                accelerator=SimpleNamespace(num_processes=1, **same),
                beta=1.0,
                loss_type="dr_grpo",
                max_completion_length=1,
                importance_sampling_level="token",
                epsilon_low=0.2,
                epsilon_high=0.2,
                rollout_importance_sampling_mode=mode,
                rollout_importance_sampling_threshold=2.0,
                log_rollout_offpolicy_metrics=False,
                disable_rollout_importance_sampling=False,
                off_policy_sequence_mask_delta=None,
                compute_entropy=False,
                overlong_filter=False,
                kl_in_reward=False,
                sdar_loss_coef=0.0,
                chord_sft_iterator=None,
                _has_teacher=False,
                _get_per_token_logps_and_entropies=lambda *_, **__: (live, None),
                _compute_rollout_offpolicy_metrics=lambda *_: {},
                _compute_is_correction_metrics=lambda *_: {},
                _metrics={"train": defaultdict(list)},
            )
            for name in ("_get_rollout_is_correction", "_apply_rollout_importance_sampling"):
                setattr(stub, name, partial(getattr(trainer, name), stub))
            batch = batch_class(
                completion_mask=scored.mask,
                truncated_mask=torch.zeros(len(live), dtype=torch.bool),
                seq_lengths=scored.mask.sum(-1),
                old_per_token_logps=scored.old_logp,
                ref_per_token_logps=scored.ref_logp,
                rollout_per_token_logps=scored.behavior_logp,
                advantages=torch.zeros_like(live.detach()),
            )
            loss: Tensor = trainer._compute_loss_and_metrics(stub, None, {}, batch)[0]
            return loss

        how = "swift.rlhf_trainers GRPOTrainer._compute_loss_and_metrics on a stub of a trainer, loss_type=dr_grpo"
        name = "GRPO (k3)" if mode is None else f"GRPO (k3), rollout_importance_sampling_mode={mode}"
        return Subject(name=name, coefficient=of_mean_loss(mean_loss), knows_engine=mode is not None, origin=how)

    return [
        Term(subject=asked(None), where="loss", default=True),
        Term(subject=asked("token_truncate"), where="loss"),
    ]


def _tunix() -> list[Term]:
    import_module("jax").config.update("jax_enable_x64", True)
    jax, function = import_module("jax"), import_module("tunix.rl.common").compute_kl_divergence

    def asked(method: str) -> Callable[[Scored], Tensor]:
        def coefficient(scored: Scored) -> Tensor:
            logp, ref_logp = (jax.numpy.asarray(x.numpy()) for x in (scored.logp.detach(), scored.ref_logp))
            slope = jax.grad(lambda x: function(x, ref_logp, method).sum())(logp)
            return torch.where(scored.mask, torch.from_numpy(jax.device_get(slope).copy()).to(scored.logp), 0.0)

        return coefficient

    how = "tunix.rl.common.compute_kl_divergence, differentiated by JAX"
    return [
        Term(subject=Subject(name=said, coefficient=asked(method), origin=how), where="loss", default=method == "kl")
        for method, said in (("kl", "k1 (kl)"), ("mse_kl", "k2 (mse_kl)"), ("low_var_kl", "k3 (low_var_kl)"))
    ]


OMEGACONF = ("omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3")
FRAMEWORKS = (
    Framework(name="kl_plugins", distribution="kl_plugins", entries=ours),
    Framework(name="TRL", distribution="trl", entries=hosts.trl),
    Framework(
        name="OpenRLHF",
        distribution="openrlhf",
        entries=hosts.openrlhf,
        note="flash-attn is a stub where it is missing",
    ),
    Framework(
        name="verl",
        distribution="verl",
        entries=hosts.verl,
        requires=("verl==0.9.1", *OMEGACONF, "tensordict", "pyvers", "codetiming", "orjson"),
    ),
    Framework(
        name="SkyRL",
        distribution="skyrl",
        entries=_skyrl,
        requires=("skyrl==0.3.0", *OMEGACONF, "jaxtyping", "wadler_lindig", "loguru"),
        bare=("skyrl", "skyrl.backends", "skyrl.backends.skyrl_train", "skyrl.backends.skyrl_train.utils"),
        paths=(".", "skyrl-gym"),
        note="only the module with the function is imported: the package wants Python 3.12",
    ),
    Framework(
        name="Unsloth",
        distribution="unsloth_zoo",
        entries=_unsloth,
        requires=("unsloth_zoo==2026.10.9",),
        environment=(
            ("UNSLOTH_ZOO_DISABLE_GPU_INIT", "1"),
            ("UNSLOTH_IS_PRESENT", "1"),
            ("UNSLOTH_COMPILE_LOCATION", str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache")),
        ),
        note="its loss in plain PyTorch, before it compiles it",
    ),
    Framework(
        name="ms-swift",
        distribution="ms_swift",
        entries=_swift,
        requires=("ms-swift==4.6.0", "trl==0.29.1", "modelscope", "modelscope_hub", "json_repair", "dacite"),
        hidden=("vllm",),
        note="with the TRL that it asks for, and without vLLM, which is too new for that",
    ),
    Framework(
        name="tunix",
        distribution="google-tunix",
        entries=_tunix,
        requires=(
            *("google-tunix==0.1.7", "flax", "jax", "jaxlib", "ml_dtypes", "opt_einsum", "treescope", "jaxtyping"),
            *("wadler_lindig", "optax", "chex", "toolz", "absl-py", "orbax-checkpoint", "etils", "humanize"),
        ),
        bare=("tunix", "tunix.rl", "tunix.sft"),
        note="only the module with the function is imported; it computes in float32 whatever it is given",
    ),
)
NOT_INSTALLABLE = {
    "NeMo-RL": "the package index only has an empty placeholder (nemo_rl 0.0.0); it is installed from its repository",
    "slime": "a source install with Megatron and SGLang, which was not tried",
    "ROLL": "a source install, which was not tried",
}


def framework(name: str) -> Framework:
    """The framework of that name."""
    return next(each for each in FRAMEWORKS if each.name == name)


__all__ = ["FRAMEWORKS", "NOT_INSTALLABLE", "Framework", "framework", "ours", "prepare"]
