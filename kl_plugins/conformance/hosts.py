"""The KL terms of TRL, OpenRLHF and verl as subjects: the hosts' own functions are run, nothing is re-implemented.

This is the only module of the kit that imports a host, and only inside its functions. The audit, the curves and the
scoreboard take their rows from here.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kl_plugins.conformance.subject import Coefficient, Scored, Subject, from_function
from kl_plugins.patching.versions import installed_version

_CANT_IMPORT = (ImportError, OSError, RuntimeError, ValueError)  # what hosts raise if something they need is missing
_DOESNT_FIT = (AttributeError, KeyError, TypeError)  # what a method raises on a stub that it wants more of
_GRPO = {True: "GRPO (k3, bias correction)", False: "GRPO (k3)"}
_SINGLE_PROCESS = {"gather": lambda x: x, "gather_for_metrics": lambda x: x, "reduce": lambda x, reduction: x}


@dataclass(frozen=True, kw_only=True)
class Term:
    """A KL term that a framework ships."""

    subject: Subject
    where: str
    """`loss` or `reward`: where the framework puts it."""
    default: bool = False
    """Whether it is what the framework does once its KL is switched on."""
    off_policy: str = ""
    """The importance weights that are part of it, named as in `KLSpec.off_policy`; empty: none."""


def in_loss(
    name: str, function: Callable[..., Tensor], origin: str, *, default: bool = False, off_policy: str = ""
) -> Term:
    """The term of a function that returns (B, T) losses; `subject.from_function` says what it is given."""
    subject = from_function(function, name=name, origin=origin)
    return Term(subject=subject, where="loss", default=default, off_policy=off_policy)


def in_reward(name: str, function: Callable[..., Tensor], origin: str, *, default: bool = False) -> Term:
    """The term of a function that returns (B, T) penalties, which the framework subtracts from rewards at rollout."""
    origin = f"{origin}; summed from the token on, times the ratio, by kl_plugins"
    subject = from_function(function, kind="reward", name=name, origin=origin)
    return Term(subject=subject, where="reward", default=default)


def of_mean_loss(mean_loss: Callable[[Scored, Tensor], Tensor]) -> Coefficient:
    """The coefficient of `mean_loss(scored, logp)`, a scalar: the mean over rows of sums over tokens.

    `logp` is a live copy of `scored.logp`. A whole batch is differentiated at once, where `from_function`, which
    doesn't know what kind of mean a scalar is, takes one row at a time.
    """

    def coefficient(scored: Scored) -> Tensor:
        live = scored.logp.detach().clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(mean_loss(scored, live) * len(live), live)[0]

    return coefficient


def trl() -> list[Term]:
    """GRPO's KL with and without its bias correction, and RLOO's: the trainers' own methods on stubs of trainers.

    Raises ImportError without TRL, and AttributeError, KeyError or TypeError if a stub doesn't fit the installed TRL.
    """
    import trl

    version = f"trl {trl.__version__}"

    def grpo(corrected: bool) -> Term:
        def mean_loss(scored: Scored, live: Tensor) -> Tensor:
            engine = scored.engine_logp
            return grpo_loss(
                trl.GRPOTrainer,
                live,
                ref_logp=scored.ref_logp,
                old_logp=scored.old_logp,
                mask=scored.mask,
                use_bias_correction_kl=corrected,
                sampling_ratio=None if engine is None else (scored.old_logp - engine).exp(),
            )

        coefficient = of_mean_loss(mean_loss)
        one = torch.zeros(1, 1)
        coefficient(Scored(logp=one, ref_logp=one, mask=one == 0, old_logp=one))  # raises if the stub doesn't fit
        how = f"{version}: GRPOTrainer._compute_loss, run on a stub of a trainer, use_bias_correction_kl={corrected}"
        subject = Subject(name=_GRPO[corrected], coefficient=coefficient, knows_engine=True, origin=how)
        return Term(subject=subject, where="loss", default=corrected, off_policy="token" if corrected else "")

    rloo = Subject(
        name="RLOO (k1, whole sequences)",
        coefficient=of_mean_loss(partial(_rloo_loss, trl.RLOOTrainer)),
        grouped=True,
        origin=f"{version}: RLOOTrainer._generate_and_score_completions and _compute_loss, run on a stub of a "
        "trainer, rewards of 0",
    )
    return [grpo(True), grpo(False), Term(subject=rloo, where="reward", default=True)]


def trl_formulas(why: str) -> list[Term]:
    """GRPO's two terms as TRL 1.16 has them, for where its own function can't be run; `why` becomes their origin."""

    def formula(corrected: bool, logp: Tensor, ref_logp: Tensor, mask: Tensor, old_logp: Tensor) -> Tensor:
        k3 = (ref_logp - logp).exp() - (ref_logp - logp) - 1
        return k3 * (logp - old_logp).exp() if corrected else k3

    return [
        in_loss(
            _GRPO[corrected],
            partial(formula, corrected),
            f"formula of TRL 1.16, {why}: exp(-u) + u - 1{', times exp(logp - old logp)' * corrected}",
            default=corrected,
            off_policy="token" if corrected else "",
        )
        for corrected in (True, False)
    ]


def grpo_loss(
    trainer: type,
    logp: Tensor,
    *,
    ref_logp: Tensor,
    old_logp: Tensor,
    mask: Tensor,
    use_bias_correction_kl: bool = True,
    importance_sampling_level: str = "token",
    loss_type: str = "luspo",
    sampling_ratio: Tensor | None = None,
) -> Tensor:
    """The scalar that `_compute_loss` of TRL's `GRPOTrainer` makes of (B, T) log-probs, with beta 1, advantages of 0.

    With `loss_type="luspo"` that is the KL term summed over tokens and averaged over sequences. `sampling_ratio` is
    that of the old policy to the vLLM engine, (B, T). Everything around the loss (model, accelerator, logs) is a stub.
    """
    ids = torch.zeros(logp.shape, dtype=torch.long, device=logp.device)
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp.detach()), None),
        accelerator=SimpleNamespace(num_processes=1, **_SINGLE_PROCESS),
        args=SimpleNamespace(use_bias_correction_kl=use_bias_correction_kl, delta=None, steps_per_generation=1),
        beta=1.0,
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        epsilon_low=0.2,
        epsilon_high=0.2,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=sampling_ratio is not None,
        vllm_importance_sampling_correction=sampling_ratio is not None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        entropy_coef=0.0,
        use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=1,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": logp.new_zeros(len(logp)),
        "ref_per_token_logps": ref_logp,
        "old_per_token_logps": old_logp,
    }
    if sampling_ratio is not None:
        inputs["importance_sampling_ratio"] = sampling_ratio
    loss: Tensor = trainer._compute_loss(stub, None, inputs)  # type: ignore[attr-defined]
    return loss


def rloo_advantages(scored: Scored, outcome: Tensor, beta: float) -> Tensor:
    """(B, T): what TRL's RLOO makes of (B,) rewards and the KL of the old policy, which is part of them."""
    import trl

    advantages: Tensor = _rloo_rollout(trl.RLOOTrainer, scored, outcome, beta)[-1]["advantages"]
    return advantages[:, None].expand_as(scored.logp)


def _rloo_loss(trainer: Any, scored: Scored, live: Tensor) -> Tensor:
    """TRL's RLOO: its rollout with the log-probs of the old policy, rewards of 0, then its loss, a mean over rows."""
    stub, scores, batch = _rloo_rollout(trainer, scored, live.new_zeros(len(live)), 1.0)
    scores[id(stub.model)] = live
    loss: Tensor = trainer._compute_loss(stub, stub.model, batch)
    return loss


def _rloo_rollout(
    trainer: Any, scored: Scored, rewards: Tensor, beta: float
) -> tuple[Any, dict[int, Tensor], dict[str, Tensor]]:
    """The stub of a trainer, the log-probs that its models return, and the batch of `trainer`'s own rollout."""
    rows, lengths = len(scored.logp), scored.mask.sum(-1).tolist()
    policy, reference = SimpleNamespace(training=True), SimpleNamespace()
    scores = {id(policy): scored.old_logp, id(reference): scored.ref_logp}

    def logps(model: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        given = scores[id(model)][:, : max(lengths)]
        return given, torch.zeros_like(given.detach()), None

    stub = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=1, process_index=0, device=rewards.device, **_SINGLE_PROCESS),
        args=SimpleNamespace(
            per_device_train_batch_size=rows,
            per_device_eval_batch_size=rows,
            gradient_checkpointing_kwargs=None,
        ),
        beta=beta,
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
        _calculate_rewards=lambda *_: rewards[:, None],
        _get_per_token_logps_and_entropies=logps,
        _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
    )
    module = sys.modules[trainer.__module__]
    with mock.patch.object(module, "disable_gradient_checkpointing", return_value=contextlib.nullcontext()):
        batch = trainer._generate_and_score_completions(stub, [{"prompt": ""}] * rows)
    return stub, scores, batch


def openrlhf() -> list[Term]:
    """OpenRLHF's estimators as a loss, its unbiased gradient, and the estimators in the reward. flash-attn may miss.

    Raises ImportError, OSError, RuntimeError or ValueError if it can't be imported.
    """
    import_openrlhf()
    from openrlhf.models.utils import compute_approx_kl

    def loss(estimator: str, unbiased: bool = False) -> Callable[..., Tensor]:
        return lambda logp, ref_logp, mask, old_logp: compute_approx_kl(
            logp, ref_logp, old_logp, kl_estimator=estimator, unbiased_gradient=unbiased
        )

    def penalty(estimator: str) -> Callable[..., Tensor]:
        return lambda logp, ref_logp: compute_approx_kl(logp, ref_logp, kl_estimator=estimator)

    estimators = ("k1", "k2", "k3")
    how = f"openrlhf {installed_version('openrlhf')}: compute_approx_kl, run"
    unbiased = in_loss("unbiased_gradient", loss("k3", True), f"{how} with unbiased_gradient=True", off_policy="token")
    return [
        *(in_loss(k, loss(k), how) for k in estimators),
        unbiased,
        *(in_reward(f"{k} in reward", penalty(k), how, default=k == "k1") for k in estimators),
    ]


def import_openrlhf() -> None:
    """OpenRLHF imports flash-attn, which needs CUDA; nothing that is measured calls it."""
    names = ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import_module("flash_attn")
    except ImportError:
        stubs: dict[str, Any] = {name: types.ModuleType(name) for name in names}
        for name in ("index_first_axis", "pad_input", "rearrange", "unpad_input"):
            setattr(stubs["flash_attn.bert_padding"], name, None)
        stubs["flash_attn.utils.distributed"].all_gather = None
        import_module("transformers.modeling_utils")  # looks for the real one, as others will
        sys.modules.update(stubs)
        try:
            import_module("openrlhf.models.ring_attn_utils")
        finally:
            for name in names:
                del sys.modules[name]
    import_module("openrlhf.models.utils")


def verl() -> list[Term]:
    """What verl's `kl_penalty` is asked for in the loss, and its default in the reward.

    Raises ImportError, OSError, RuntimeError or ValueError if it can't be imported.
    """
    kl_penalty = import_module("verl.trainer.ppo.core_algos").kl_penalty
    how = f"verl {installed_version('verl')}: core_algos.kl_penalty, run"

    def asked(name: str) -> Callable[..., Tensor]:
        return lambda logp, ref_logp: kl_penalty(logp, ref_logp, name)

    found = []
    for name in ("k1", "abs", "k2", "low_var_kl", "k1+", "k3+"):
        with contextlib.suppress(NotImplementedError):  # older ones have no "+"
            asked(name)(torch.zeros(1, 1), torch.zeros(1, 1))
            said = "k3 (low_var_kl)" if name == "low_var_kl" else name
            found.append(in_loss(said, asked(name), how, default=name == "low_var_kl"))
    return [*found, in_reward("k1 in reward", asked("k1"), how, default=True)]


HOSTS: dict[str, Callable[[], list[Term]]] = {"TRL": trl, "OpenRLHF": openrlhf, "verl": verl}


def installed(host: str) -> tuple[list[Term], str]:
    """The terms of one of `HOSTS` here, and what stands in the way of running its functions; empty: nothing.

    Where TRL's can't be run, their formula stands for them; of OpenRLHF and verl there are no terms then.
    """
    version = installed_version(host.lower())
    try:
        with quiet():
            return HOSTS[host](), ""
    except _CANT_IMPORT as error:
        why = f"{host} is installed, but can't be imported: {_first_line(error)}" if version else ""
    except _DOESNT_FIT as error:
        why = f"{host} {version} is installed, but its function asks for more than it is given here: {error!r}"
    why = why or f"{host} is not installed"
    if host != "TRL":
        return [], why
    return trl_formulas(f"not run ({why})"), f"{why}; its formula stands for it"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of what is imported and run: they are the hosts' to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


__all__ = [
    "HOSTS",
    "Term",
    "grpo_loss",
    "import_openrlhf",
    "in_loss",
    "in_reward",
    "installed",
    "of_mean_loss",
    "openrlhf",
    "quiet",
    "rloo_advantages",
    "trl",
    "trl_formulas",
    "verl",
]
