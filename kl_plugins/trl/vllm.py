"""vLLM rollouts: the log-probs that RLOO throws away, and a weight sync that works on a CPU engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging
from trl.trainer.utils import pad

from kl_plugins.errors import ConfigError

logger = logging.get_logger(__name__)


def follow_policy_on_cpu(generation: Any) -> None:
    """Make the weight sync of a colocated *CPU* engine reload the model as a whole; anywhere else do nothing.

    `generation` is TRL's `VLLMGeneration`, whose `sync_weights` is replaced.

    vLLM prepacks linear weights on a CPU, so that TRL's sync, which loads parameters one by one, raises
    "'Parameter' object has no attribute 'weight_loader'".
    """
    if generation.mode != "colocate" or not _engine_is_cpu():
        return

    def sync_weights() -> None:
        worker = generation.llm.llm_engine.model_executor.driver_worker
        # Cloned, since a merged LoRA weight changes again when the host's iterator ends.
        weights = [(name, weight.detach().clone()) for name, weight in generation._iter_named_params()]
        worker.reload_weights(weights_iterator=iter(weights))
        _repack_heads(worker.model_runner.get_model())
        generation.llm.reset_prefix_cache()

    generation.sync_weights = sync_weights
    logger.info("vLLM runs on the CPU: its weights are reloaded as a whole at each sync")


def _repack_heads(model: Any) -> None:
    """Pack the LM head of vLLM's CPU `model` anew.

    A tied head shares the embeddings' tensor, which a reload fills, but multiplies with a packed copy of its own,
    which the reload leaves as it was: the engine would go on sampling with the old head.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


def require_processed_logprobs(client: Any) -> None:
    """Raise `ConfigError` unless a vLLM server reports the log-probs of the distribution that it samples from.

    `client` is TRL's `VLLMClient`. With temperature 0.7, say, a server that reports raw log-probs gives those of
    temperature 1.
    """
    mode = client.get_server_info()["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        raise ConfigError(
            f"the vLLM server reports {mode}, not those of the distribution it samples from, and the KL would be "
            "weighted by them: restart it with --logprobs-mode processed_logprobs"
        )


def _engine_is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


class RecordedLogps:
    """Asks a trainer's vLLM engine for the log-probs of the sampled tokens, and keeps those of the last rollout.

    Args:
        generation: TRL's `VLLMGeneration`, whose `generate` is replaced by one that also keeps them.
        pad_to_multiple_of: As TRL pads completions.
    """

    def __init__(self, generation: Any, pad_to_multiple_of: int | None) -> None:
        self._pad_to_multiple_of = pad_to_multiple_of
        self._last: list[list[list[float | None]]] | None = None
        generate = generation.generate
        generation.logprobs = 0  # only the sampled token's

        def recorded(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            rollout: tuple[Any, ...] = generate(*args, **kwargs)
            self._last = rollout[2]
            return rollout

        generation.generate = recorded

    def take(self, like: Tensor) -> Tensor:
        """(B, T) in nats of the last rollout, with the shape and device of `like`; NaN where vLLM gave no number.

        Raises `RuntimeError` if the rollout has another shape.
        """
        rows = [[torch.nan if logps[0] is None else logps[0] for logps in row] for row in self._last or []]
        self._last = None
        padded: Tensor = pad([torch.tensor(row) for row in rows], pad_to_multiple_of=self._pad_to_multiple_of)
        if padded.shape != like.shape:
            raise RuntimeError(f"vLLM reported log-probs for {tuple(padded.shape)} tokens, not {tuple(like.shape)}")
        return padded.to(like.device)
