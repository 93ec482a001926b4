"""In the policy's processes: what the log-probs of a run say about its KL, ours or OpenRLHF's own (`kl_monitor`).

It reads what a training step computes anyway, and changes nothing. `kl_plugins.core.monitor` has the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kl_plugins.core.monitor import MAXIMA, coefficient, merged, monitor_metrics, monitor_sums, nothing_seen
from kl_plugins.errors import PatchError
from kl_plugins.integration.tokenizers import token_classes
from kl_plugins.openrlhf.hostdata import left_out_of, max_over_ranks, seeing, sum_over_ranks, token_ids
from kl_plugins.openrlhf.plan import Plan, plan_of


@contextmanager
def watching(trainer: Any, experience: Any) -> Iterator[None]:
    """Add the training step within to what `metrics_of` tells, if the plan has a monitor.

    Raises `PatchError` unless the step scored its micro-batch once, and asked for its KL once if that is in the loss.
    """
    plan = plan_of(trainer.args)
    if not plan.monitor:
        yield
        return
    loss_fn, mask = trainer.actor_loss_fn, experience.action_mask
    scored: list[Tensor] = []
    coefficients: list[Tensor | None] = []

    def scoring(log_probs: Tensor, *args: Any, **kwargs: Any) -> Any:
        scored.append(log_probs.detach())
        return loss_fn(log_probs, *args, **kwargs)

    trainer.actor_loss_fn = scoring
    try:
        # Now, not later: the step's backward pass frees the graph.
        with seeing(lambda log_probs, _, kl: coefficients.append(coefficient(kl, log_probs, mask))):
            yield
    finally:
        trainer.actor_loss_fn = loss_fn
    expected = 0 if plan.in_reward else 1
    if (len(scored), len(coefficients)) != (1, expected):
        raise PatchError(
            f"kl_monitor expected OpenRLHF to score a micro-batch once and to compute its KL {expected} times in the "
            f"loss, found {len(scored)} and {len(coefficients)}: install a tested version (see `kl-plugins doctor`), "
            "or leave kl_monitor out"
        )
    sums = _sums_of(trainer, experience, scored[0], *coefficients)
    so_far = getattr(trainer, "kl_plugins_monitored", None)
    trainer.kl_plugins_monitored = sums if so_far is None else merged(torch.stack([sums, so_far]))


def metrics_of(trainer: Any) -> dict[str, float]:
    """The numbers over all steps of a `ppo_train` and all ranks; none if no rank took a step."""
    mine = trainer.kl_plugins_monitored
    mine = nothing_seen("cpu") if mine is None else mine
    sums, maxima = mine[: -len(MAXIMA)], mine[-len(MAXIMA) :]
    return monitor_metrics(torch.cat([sum_over_ranks(trainer, sums), max_over_ranks(trainer, maxima)]))


def _sums_of(trainer: Any, experience: Any, logp: Tensor, coefficient: Tensor | None = None) -> Tensor:
    """`monitor_sums` of a micro-batch."""
    if experience.base_action_log_probs is None:
        raise PatchError(
            "an experience came without the reference's log-probs: it was made in a process without kl_plugins"
        )
    ids, mask, plan = token_ids(experience), experience.action_mask, plan_of(trainer.args)
    left_out = left_out_of(plan, experience) if isinstance(plan, Plan) else {}
    classes = _classes(trainer, ids.device)
    tensors = {
        "logp": logp,
        "mask": mask,
        "ref_logp": experience.base_action_log_probs,
        "old_logp": experience.action_log_probs,
        "engine_logp": experience.rollout_log_probs,
        "classes": None if classes is None else classes[ids.clamp(max=len(classes) - 1)],
        "coefficient": coefficient,
        "left_out": torch.stack(list(left_out.values())).any(0) if left_out else None,
    }
    # The completion goes to column 0, where OpenRLHF has the prompt; that comes behind it, and has mask 0 as before.
    column = torch.arange(mask.size(1), device=mask.device) + mask.long().argmax(1, keepdim=True)
    column %= mask.size(1)
    return monitor_sums(**{name: x.gather(1, column) for name, x in tensors.items() if x is not None})


def _classes(trainer: Any, device: torch.device) -> Tensor | None:
    """Token id -> index into `monitor.CLASSES`, made once; None for a trainer without a tokenizer."""
    if trainer.tokenizer is not None and not hasattr(trainer, "kl_plugins_classes"):
        ends = getattr(trainer.actor.model, "generation_config", None)
        tokenizer = getattr(trainer.tokenizer, "tokenizer", trainer.tokenizer)  # that of a processor
        classes = token_classes(tokenizer, getattr(ends, "eos_token_id", None))
        trainer.kl_plugins_classes = torch.tensor(classes, device=device)
    return getattr(trainer, "kl_plugins_classes", None)
