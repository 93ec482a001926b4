"""The trainer that `KLMonitorCallback` watches: which it is, what it can't show, its tokens and its reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl
import trl.trainer.utils as trl_utils
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import Trainer

from kl_plugins.errors import PatchError, refuse
from kl_plugins.integration.tokenizers import token_classes as classes_of
from kl_plugins.trl.config import check_trl
from kl_plugins.trl.reference import load_reference


def trainer_that_called(args: Any) -> Any:
    """The trainer that is calling its callbacks, found on the stack by its `args`: it hands them its parts only.

    Raises `PatchError` if something else called.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and owner.args is args:
            return owner
        frame = frame.f_back
    raise PatchError(
        "KLMonitorCallback was called by something else than a transformers.Trainer: attach(trainer) before training"
    )


def is_ours(trainer: Any) -> bool:
    """Whether the trainer trains with a KL of `kl_plugins`, and not with TRL's own."""
    return getattr(trainer, "kl_spec", None) is not None


def is_exact(trainer: Any) -> bool:
    """Whether its KL is summed over the vocabulary, so that it isn't a function of the sampled tokens' log-probs."""
    return is_ours(trainer) and bool(trainer.kl_spec.loss.exact)


def is_rloo(trainer: Any) -> bool:
    """Whether the trainer is TRL's `RLOOTrainer`, or derives from it."""
    return isinstance(trainer, trl.RLOOTrainer)


def check(trainer: Any, *, reference: Any, gradient_ratio_every: int) -> None:
    """Raise for what can't be watched (`PatchError`), or not as it was asked for (`ConfigError`)."""
    if not isinstance(trainer, trl.RLOOTrainer | trl.GRPOTrainer):
        raise PatchError(
            "KLMonitorCallback reads what TRL's GRPO, RLOO and GMPO trainers compute, found a "
            f"{type(trainer).__name__}: leave it out"
        )
    gmpo = any(base.__module__.startswith("trl.experimental.gmpo") for base in type(trainer).__mro__)
    check_trl("rloo" if is_rloo(trainer) else "grpo", *(["gmpo"] if gmpo else []))
    problems = []
    if any(hasattr(value, "kl_monitor") for value in vars(trainer).values()):
        problems.append("this trainer has a KLMonitorCallback already, and both log the same names: remove one")
    if hasattr(trainer, "compute_liger_loss") and trainer.use_liger_kernel:
        problems.append("use_liger_kernel=True: that loss never forms the log-probs that are read; set it to False")
    if trainer.accelerator.device.type == "mps":
        problems.append("device mps: the sums need float64, which it doesn't have; leave KLMonitorCallback out")
    problems += [f"reference={reference!r} {why}" for why in _reference_problems(trainer, reference)]
    if gradient_ratio_every:
        problems += [
            f"gradient_ratio_every={gradient_ratio_every} {why}; set it to 0" for why in _gradient_problems(trainer)
        ]
    refuse(problems)


def _reference_problems(trainer: Any, reference: Any) -> Iterator[str]:
    if reference is None:
        return
    if trainer.beta != 0:
        yield f"with beta={float(trainer.beta):g}: the trainer scores a reference of its own; leave it out"
    elif not _is_own_base(trainer, reference) and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        yield "with DeepSpeed or FSDP, for which only 'base' with LoRA is there: leave it out"


def _gradient_problems(trainer: Any) -> Iterator[str]:
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        yield "with DeepSpeed or FSDP, which split or gather gradients in their own backward pass"
    if trainer.args.gradient_checkpointing and (trainer.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        yield "with reentrant gradient checkpointing, whose graph has one backward pass only"
    if trainer.beta == 0:
        yield "with beta=0: there is no KL gradient"
    elif is_rloo(trainer) and not is_ours(trainer):
        yield "with TRL's RLOO, whose KL is in the reward and not in the loss"


def missing(trainer: Any, reference: Any) -> Iterator[str]:
    """A sentence for each number of `KLMonitorCallback` that isn't available with this trainer, and why."""
    if trainer.beta == 0 and reference is None:
        yield "the KL: beta is 0, so that there is no reference; KLMonitorCallback(reference='base') has one scored"
    if is_exact(trainer):
        yield "kl/dead: an exact KL has its gradient through hidden states, too"
    if is_rloo(trainer) and not is_ours(trainer):
        if trainer.beta != 0:
            yield "kl/dead: the KL is in RLOO's reward, not in its loss"
        if trainer.use_vllm:
            yield "kl/engine_*: TRL's RLOO asks vLLM for no log-probs; kl/ratio_* are against the trainer's old policy"


def token_classes(trainer: Any) -> Tensor:
    """Token id -> index into `CLASSES`, on the trainer's device; see `integration.tokenizers.token_classes`."""
    processor = trainer.processing_class
    ends = getattr(trainer.accelerator.unwrap_model(trainer.model).generation_config, "eos_token_id", None)
    classes = classes_of(getattr(processor, "tokenizer", processor), ends)
    return torch.tensor(classes, device=trainer.accelerator.device)


def _is_base(reference: Any) -> bool:
    return isinstance(reference, str) and reference == "base"


def _is_own_base(trainer: Any, reference: Any) -> bool:
    return _is_base(reference) and is_peft_model(trainer.model)


def prepared_reference(trainer: Any, reference: Any) -> Any:
    """The reference as TRL would load and prepare its own; None: there is none, or it is the policy's own base."""
    if reference is None or _is_own_base(trainer, reference):
        return None
    return load_reference(
        trainer, trl_utils.get_config_model_id(trainer.model.config) if _is_base(reference) else reference
    )


@contextmanager
def without_adapters(trainer: Any) -> Iterator[Any]:
    """The policy without its adapters, in evaluation mode, so that scoring with it draws no random numbers."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    training = [module for module in policy.modules() if module.training]
    policy.eval()
    try:
        with trl_utils.use_adapter(policy, None):
            yield trainer.model
    finally:
        for module in training:
            module.training = True
