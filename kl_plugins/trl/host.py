"""What is read of a trainer of TRL, and which of its methods are extended: for mypy, since TRL has no types.

A mixin of ours derives from one of these protocols in mypy's eyes only. At run time its base is `object`, and TRL's
own class, which comes after it, has what the protocol promises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class HostTrainer(Protocol):
    """What every trainer of TRL has."""

    args: Any
    """Its config: TRL's, or one of ours with the `kl_*` fields."""
    accelerator: Any
    """An `accelerate.Accelerator`."""
    processing_class: Any
    """A tokenizer, or a processor that has one as `tokenizer`."""
    add_callback: Callable[..., None]
    log: Callable[..., None]


class OnlineTrainer(HostTrainer, Protocol):
    """What GRPO's trainer, RLOO's and GMPO's have."""

    model: Any
    ref_model: Any
    beta: float
    temperature: float
    state: Any
    use_vllm: bool
    vllm_generation: Any
    """TRL's `VLLMGeneration`; only there with `use_vllm`."""
    pad_to_multiple_of: int | None
    num_generations: int
    num_generations_eval: int
    reward_weights: Tensor
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    _metrics: dict[str, dict[str, list[float]]]

    training_step: Callable[..., Tensor]
    _get_output_dir: Callable[..., str]
    _save_checkpoint: Callable[..., None]
    _load_from_checkpoint: Callable[..., None]
    _calculate_rewards: Callable[..., Tensor]
    _generate_and_score_completions: Callable[..., dict[str, Any]]
    _get_per_token_logps_and_entropies: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    _compute_loss: Callable[..., Tensor]


class PPOHostTrainer(HostTrainer, Protocol):
    """What PPO's trainer has."""

    policy_model: Any
    stop_token_id: int
    train: Callable[[], None]
