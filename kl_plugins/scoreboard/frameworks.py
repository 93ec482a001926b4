"""The real functions of each framework as subjects of `kl_plugins.conformance`. Nothing is re-implemented.

A framework that is installed is imported as it is; others can be put, without their dependencies, into a folder each
(`kl-plugins scoreboard --install`), together with the few packages that importing the function needs. Where the
`__init__` of a package wants a GPU or another Python, it is left out and only the module with the function is run.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kl_plugins.conformance.subject import Scored, Subject, from_function, from_spec
from kl_plugins.core.registry import all_losses
from kl_plugins.core.spec import KLSpec
from kl_plugins.explain.curves import host_loss

UNBOUNDED = (0.0, float("inf"))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the scoreboard."""

    subject: Subject
    where: str
    """`loss` or `reward`: where the framework puts it."""
    default: bool = False
    """Whether it is what the framework does unless told otherwise."""
    off_policy: str = ""
    """Of ours: `KLSpec.off_policy`."""


@dataclass(frozen=True, kw_only=True)
class Framework:
    """A framework, how its functions are got at, and what installing them takes."""

    name: str
    distribution: str
    """Whose version is shown."""
    entries: Callable[[], list[Entry]]
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
    """How it is run, where that isn't plain."""


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


def ours() -> list[Entry]:
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


def _own(name: str, credit: str, options: dict[str, Any]) -> Entry:
    spec = KLSpec(name=name, credit=credit, **options)
    words = [f"{name} {credit}", *(["leave-one-out"] if spec.baseline else [])]
    if options.get("off_policy"):
        words.append(f"{spec.off_policy} weights")
    return Entry(
        subject=from_spec(spec, name=", ".join(words)),
        where="reward" if spec.loss.in_reward else "loss",
        default=not options and credit == spec.loss.default_credit,
        off_policy=spec.off_policy,
    )


def _in_loss(name: str, function: Callable[..., Tensor], origin: str, *, default: bool = False) -> Entry:
    return Entry(subject=from_function(function, name=name, origin=origin), where="loss", default=default)


def _in_reward(name: str, function: Callable[..., Tensor], origin: str, *, default: bool = False) -> Entry:
    subject = from_function(
        function,
        kind="reward",
        name=name,
        origin=f"{origin}; summed from the token on, times the ratio, by kl_plugins",
    )
    return Entry(subject=subject, where="reward", default=default)


def _trl() -> list[Entry]:
    import trl

    def grpo(
        corrected: bool, logp: Tensor, ref_logp: Tensor, mask: Tensor, old_logp: Tensor, engine_logp: Any
    ) -> Tensor:
        ratio = None if engine_logp is None else (old_logp - engine_logp).exp()  # vLLM's correction, as TRL makes it
        loss = host_loss(
            trl.GRPOTrainer,
            logp,
            ref_logp=ref_logp,
            old_logp=old_logp,
            mask=mask,
            use_bias_correction_kl=corrected,
            sampling_ratio=ratio,
        )
        return loss * len(logp)

    def subject(name: str, corrected: bool) -> Subject:
        """The loss is a sum over rows, so that whole batches can be differentiated at once."""

        def coefficient(scored: Scored) -> Tensor:
            live = scored.logp.detach().clone().requires_grad_()
            with torch.enable_grad():
                loss = grpo(corrected, live, scored.ref_logp, scored.mask, scored.old_logp, scored.engine_logp)
                return torch.autograd.grad(loss, live)[0]

        origin = (
            f"GRPOTrainer._compute_loss on a stub of a trainer, use_bias_correction_kl={corrected}, loss_type=luspo"
        )
        return Subject(name=name, coefficient=coefficient, knows_engine=True, origin=origin)

    rloo = Subject(
        name="RLOO (k1, whole sequences)",
        coefficient=partial(_rloo, trl.RLOOTrainer),
        grouped=True,
        origin="RLOOTrainer._generate_and_score_completions and _compute_loss on a stub of a trainer, rewards of 0",
    )
    return [
        Entry(subject=subject("GRPO (k3, bias correction)", True), where="loss", default=True),
        Entry(subject=subject("GRPO (k3)", False), where="loss"),
        Entry(subject=rloo, where="reward", default=True),
    ]


def _rloo(trainer: type, scored: Scored) -> Tensor:
    """(B, T) derivative of TRL's RLOO loss: its rollout with the log-probs of the old policy, then its loss."""
    same = {"gather": lambda x: x, "gather_for_metrics": lambda x: x, "reduce": lambda x, reduction: x}
    accelerator = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"), **same)
    rows, lengths = len(scored.logp), scored.mask.sum(-1).tolist()
    policy, reference = SimpleNamespace(training=True), SimpleNamespace()
    live = scored.logp.detach().clone().requires_grad_()
    scores = {id(policy): scored.old_logp, id(reference): scored.ref_logp}

    def logps(model: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        given = scores[id(model)][:, : max(lengths)]
        return given, torch.zeros_like(given.detach()), None

    stub = SimpleNamespace(
        accelerator=accelerator,
        args=SimpleNamespace(
            per_device_train_batch_size=rows,
            per_device_eval_batch_size=rows,
            gradient_checkpointing_kwargs=None,
        ),
        beta=1.0,
        num_generations=scored.group_size,
        num_generations_eval=scored.group_size,
        epsilon_low=0.2,
        epsilon_high=0.2,
        normalize_advantages=False,
        reward_clip_range=None,
        reward_weights=torch.ones(1),
        reward_func_names=["none"],
        mask_truncated_completions=False,
        pad_to_multiple_of=None,
        aux_loss_enabled=False,
        log_multimodal=False,
        model=policy,
        ref_model=reference,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _generate=lambda prompts: ([[0]] * rows, [[1] * length for length in lengths], [""] * rows),
        _calculate_rewards=lambda *_: torch.zeros(rows, 1, dtype=live.dtype),
        _get_per_token_logps_and_entropies=logps,
        _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
    )
    module = sys.modules[trainer.__module__]
    found: Any = trainer
    nothing = contextlib.nullcontext()
    with mock.patch.object(module, "disable_gradient_checkpointing", return_value=nothing):
        batch = found._generate_and_score_completions(stub, [{"prompt": ""}] * rows)
    scores[id(policy)] = live
    with torch.enable_grad():
        loss = found._compute_loss(stub, policy, batch)
        return torch.autograd.grad(loss * rows, live)[0]


def _openrlhf() -> list[Entry]:
    _import_openrlhf()
    from openrlhf.models.utils import compute_approx_kl

    def asked(estimator: str, unbiased: bool) -> Callable[..., Tensor]:
        return lambda logp, ref_logp, mask, old_logp: compute_approx_kl(
            logp, ref_logp, old_logp, kl_estimator=estimator, unbiased_gradient=unbiased
        )

    def value(estimator: str) -> Callable[..., Tensor]:
        return lambda logp, ref_logp: compute_approx_kl(logp, ref_logp, kl_estimator=estimator)

    how = "openrlhf.models.utils.compute_approx_kl"
    found = [_in_loss(k, asked(k, False), how) for k in ("k1", "k2", "k3")]
    found.append(_in_loss("unbiased_gradient", asked("k3", True), f"{how}, unbiased_gradient=True"))
    return found + [_in_reward(f"{k} in reward", value(k), how, default=k == "k1") for k in ("k1", "k2", "k3")]


def _import_openrlhf() -> None:
    """OpenRLHF imports flash-attn, which needs CUDA; nothing that is measured calls it."""
    names = ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    stubs = {name: types.ModuleType(name) for name in names}
    for name in ("index_first_axis", "pad_input", "rearrange", "unpad_input"):
        setattr(stubs["flash_attn.bert_padding"], name, None)
    setattr(stubs["flash_attn.utils.distributed"], "all_gather", None)  # noqa: B010
    try:
        import_module("flash_attn")
    except ImportError:
        import_module("transformers.modeling_utils")  # looks for the real one, as others will
        sys.modules.update(stubs)
        try:
            import_module("openrlhf.models.ring_attn_utils")
        finally:
            for name in names:
                del sys.modules[name]
    import_module("openrlhf.models.utils")


def _verl() -> list[Entry]:
    module = import_module("verl.trainer.ppo.core_algos")
    how = "verl.trainer.ppo.core_algos.kl_penalty"

    def asked(name: str) -> Callable[..., Tensor]:
        return lambda logp, ref_logp: module.kl_penalty(logp, ref_logp, name)

    found = []
    for name in ("k1", "abs", "k2", "low_var_kl", "k1+", "k3+"):
        with contextlib.suppress(NotImplementedError):  # older ones have no "+"
            asked(name)(torch.zeros(1, 1), torch.zeros(1, 1))
            said = "k3 (low_var_kl)" if name == "low_var_kl" else name
            found.append(_in_loss(said, asked(name), how, default=name == "low_var_kl"))
    return [*found, _in_reward("k1 in reward", asked("k1"), how, default=True)]


def _skyrl() -> list[Entry]:
    module = import_module("skyrl.backends.skyrl_train.utils.ppo_utils")
    how = "skyrl.backends.skyrl_train.utils.ppo_utils.compute_approx_kl"

    def asked(name: str) -> Callable[..., Tensor]:
        return lambda logp, ref_logp, mask: module.compute_approx_kl(logp, ref_logp, mask, name)

    found = [_in_loss(k, asked(k), how, default=k == "k3") for k in ("k1", "abs", "k2", "k3")]
    return found + [_in_reward(f"{k} in reward", asked(k), how) for k in ("k1", "k3")]


def _unsloth() -> list[Entry]:
    module = import_module("unsloth_zoo.rl_replacements")

    def asked(corrected: bool) -> Subject:
        def coefficient(scored: Scored) -> Tensor:
            live = scored.logp.detach().clone().requires_grad_()
            with torch.enable_grad():
                loss = module.grpo_compute_loss(
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
                return torch.autograd.grad(loss * len(live), live)[0]

        name = "GRPO (k3, bias correction)" if corrected else "GRPO (k3)"
        how = f"unsloth_zoo.rl_replacements.grpo_compute_loss, use_bias_correction_kl={corrected}, loss_type=luspo"
        return Subject(name=name, coefficient=coefficient, knows_engine=True, origin=how)

    return [Entry(subject=asked(True), where="loss", default=True), Entry(subject=asked(False), where="loss")]


def _swift() -> list[Entry]:
    trainer = import_module("swift.rlhf_trainers.grpo_trainer").GRPOTrainer
    batch_class = import_module("swift.rl_core.data").GRPOBatch
    same = {"gather": lambda x: x, "gather_for_metrics": lambda x: x, "reduce": lambda x, reduction: x}

    def asked(mode: str | None) -> Subject:
        def coefficient(scored: Scored) -> Tensor:
            live = scored.logp.detach().clone().requires_grad_()
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
            with torch.enable_grad():
                loss = trainer._compute_loss_and_metrics(stub, None, {}, batch)[0]
                return torch.autograd.grad(loss * len(live), live)[0]

        how = "swift.rlhf_trainers GRPOTrainer._compute_loss_and_metrics on a stub of a trainer, loss_type=dr_grpo"
        name = "GRPO (k3)" if mode is None else f"GRPO (k3), rollout_importance_sampling_mode={mode}"
        return Subject(name=name, coefficient=coefficient, knows_engine=mode is not None, origin=how)

    return [
        Entry(subject=asked(None), where="loss", default=True),
        Entry(subject=asked("token_truncate"), where="loss"),
    ]


def _tunix() -> list[Entry]:
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
        Entry(subject=Subject(name=said, coefficient=asked(method), origin=how), where="loss", default=method == "kl")
        for method, said in (("kl", "k1 (kl)"), ("mse_kl", "k2 (mse_kl)"), ("low_var_kl", "k3 (low_var_kl)"))
    ]


OMEGACONF = ("omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3")
FRAMEWORKS = (
    Framework(name="kl_plugins", distribution="kl_plugins", entries=ours),
    Framework(name="TRL", distribution="trl", entries=_trl),
    Framework(
        name="OpenRLHF", distribution="openrlhf", entries=_openrlhf, note="flash-attn is a stub where it is missing"
    ),
    Framework(
        name="verl",
        distribution="verl",
        entries=_verl,
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
    """The one of that name."""
    return next(each for each in FRAMEWORKS if each.name == name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings of frameworks are theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


__all__ = ["FRAMEWORKS", "NOT_INSTALLABLE", "Entry", "Framework", "framework", "ours", "prepare", "quiet"]
