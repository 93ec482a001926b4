"""In the policy's processes (`PolicyModelActor`): the KL in the loss, and what the logs say about any KL.

Each function here takes one of OpenRLHF's and returns what takes its place; `patches/openrlhf.toml` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from kl_plugins.core.advantages import refresh_advantages
from kl_plugins.core.checks import require_policy_scores
from kl_plugins.core.terms import KLTerms, kl_terms
from kl_plugins.errors import PatchError
from kl_plugins.integration.recorder import Recorder
from kl_plugins.openrlhf import worker
from kl_plugins.openrlhf.hostdata import from_info, left_out_of, max_over_ranks, show, sum_over_ranks
from kl_plugins.openrlhf.monitor import metrics_of, watching
from kl_plugins.openrlhf.plan import Plan, plan_of

Host = Callable[..., Any]

# What `compute_approx_kl` answers while a training step asks for the KL of its micro-batch.
_answer: ContextVar[Callable[[Tensor, Tensor], Tensor] | None] = ContextVar("kl_plugins_answer", default=None)


def compute_approx_kl(host: Host) -> Host:
    """OpenRLHF's estimator of the KL, (B, T) of (B, T) log-probs, in nats.

    Within a hooked step of a KL in the loss it is the `loss` of `kl_terms` instead, which OpenRLHF reduces as its own.
    """

    def answered(log_probs: Tensor, log_probs_base: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        answer = _answer.get()
        if answer is None:
            kl: Tensor = host(log_probs, log_probs_base, *args, **kwargs)
        else:
            kl = answer(log_probs, log_probs_base)
        show(log_probs, log_probs_base, kl)
        return kl

    return answered


@contextmanager
def answering(answer: Callable[[Tensor, Tensor], Tensor], expected: int) -> Iterator[None]:
    """While active, OpenRLHF's estimator returns `answer(log_probs, log_probs_base)`.

    Raises `PatchError` unless it was asked `expected` times.
    """
    asked = 0

    def counted(log_probs: Tensor, log_probs_base: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return answer(log_probs, log_probs_base)

    token = _answer.set(counted)
    try:
        yield
    finally:
        _answer.reset(token)
    if asked != expected:
        raise PatchError(
            f"OpenRLHF was expected to compute its KL {expected} times here, found {asked}: this version computes it "
            "elsewhere; install a tested version (see `kl-plugins doctor`) or start it without kl_plugins"
        )


def training_step(host: Host) -> Host:
    """`ActorPPOTrainer.training_step`, with the KL of the plan in its loss, or (in the reward) in its advantages.

    With `kl_monitor` the step is watched, too. Raises `PatchError` if OpenRLHF doesn't compute its KL where it was
    expected to, or if the run came without a plan.
    """

    def step(trainer: Any, experience: Any, kl_ctl: float, *args: Any, **kwargs: Any) -> Any:
        with watching(trainer, experience):
            return planned(trainer, experience, kl_ctl, *args, **kwargs)

    def planned(trainer: Any, experience: Any, kl_ctl: float, *args: Any, **kwargs: Any) -> Any:
        plan = plan_of(trainer.args)
        if not isinstance(plan, Plan):
            return host(trainer, experience, kl_ctl, *args, **kwargs)
        beta = float(kl_ctl)
        if plan.in_reward:
            with _advantages_of_now(trainer, plan, experience, beta), answering(_unexpected, expected=0):
                return host(trainer, experience, kl_ctl, *args, **kwargs)

        def term(log_probs: Tensor, log_probs_base: Tensor) -> Tensor:
            terms = terms_of(plan, experience, log_probs, log_probs_base)
            trainer.kl_plugins_recorder.add(terms, beta)
            return terms.loss

        with answering(term, expected=1):
            return host(trainer, experience, kl_ctl, *args, **kwargs)

    return step


def ppo_train(host: Host) -> Host:
    """`ActorPPOTrainer.ppo_train`, whose result, which OpenRLHF logs, gets the `kl/*` numbers of all its steps."""

    def train(trainer: Any, kl_ctl: float) -> dict[str, Any]:
        plan = plan_of(trainer.args)
        trainer.kl_plugins_recorder = recorder_of(trainer)
        trainer.kl_plugins_monitored = None
        status: dict[str, Any] = host(trainer, kl_ctl)
        if plan.monitor:
            status.update(metrics_of(trainer))
        if isinstance(plan, Plan):  # whose numbers go before those of the same name
            status.update(_metrics(trainer, plan, float(kl_ctl)))
        worker.report()
        return status

    return train


def terms_of(plan: Plan, experience: Any, log_probs: Tensor, log_probs_base: Tensor) -> KLTerms:
    """`kl_terms` of a micro-batch. The behavior policy is vLLM where it reported log-probs, else the old policy.

    `experience.kl` holds what `experience.compute_advantages_and_returns` put there: the leave-one-out baseline.
    """
    behavior = experience.rollout_log_probs
    require_policy_scores(plan.spec, logp=log_probs, mask=experience.action_mask, host="OpenRLHF")
    return kl_terms(
        plan.spec,
        logp=log_probs,
        ref_logp=log_probs_base,
        mask=experience.action_mask,
        behavior_logp=experience.action_log_probs if behavior is None else behavior,
        baseline=None if plan.spec.baseline is None else experience.kl,
        group_size=plan.group_size,
        **left_out_of(plan, experience),
    )


@contextmanager
def _advantages_of_now(trainer: Any, plan: Plan, experience: Any, beta: float) -> Iterator[None]:
    """Bring the KL in the advantages up to date with the policy that is being updated; see `refresh_advantages`."""
    loss_fn = trainer.actor_loss_fn
    scale = _advantage_scale(experience)
    plan = without_baseline(plan)  # which is in the advantages already

    def loss_of_now(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *args: Any, **kwargs: Any) -> Any:
        base = experience.base_action_log_probs
        now = terms_of(plan, experience, log_probs, base)
        then = terms_of(plan, experience, old_log_probs, base)
        trainer.kl_plugins_recorder.add(now, beta)
        advantages = refresh_advantages(
            advantages,
            spec=plan.spec,
            now=now,
            then=then,
            discount=plan.discount,
            scale=beta * scale,
            normalized=plan.normalized,
        )
        return loss_fn(log_probs, old_log_probs, advantages, *args, **kwargs)

    trainer.actor_loss_fn = loss_of_now
    try:
        yield
    finally:
        trainer.actor_loss_fn = loss_fn


def without_baseline(plan: Plan) -> Plan:
    """The plan without its baseline, for a KL from which it is subtracted at another place."""
    return replace(plan, spec=replace(plan.spec, baseline=None))


SCALE = "kl/advantage_scale"
KL_SUMS = "kl_plugins/sums"


def _advantage_scale(experience: Any) -> Tensor:
    """(B, 1). What OpenRLHF's normalization has multiplied the advantages with, as `experience` has read it off."""
    return from_info(experience, SCALE).unsqueeze(1)


def _unexpected(log_probs: Tensor, log_probs_base: Tensor) -> Tensor:
    raise PatchError("OpenRLHF asked for a KL in the loss, but the configuration has it in the reward")


def recorder_of(trainer: Any) -> Recorder:
    """A `Recorder` over the ranks of the policy, of which some may take no step of a `ppo_train`."""
    return Recorder(
        sum_over_ranks=partial(sum_over_ranks, trainer), max_over_ranks=partial(max_over_ranks, trainer), in_step=False
    )


def _metrics(trainer: Any, plan: Plan, beta: float) -> dict[str, Any]:
    """The `kl/*` numbers over all steps of a `ppo_train` and all ranks; none if no rank took a step.

    And, for `experience.train_step`, the sums that a controller is updated with, (13,).
    """
    recorder = trainer.kl_plugins_recorder
    # In the reward OpenRLHF's own ratio and clip apply, and are logged by it.
    metrics = recorder.metrics(beta=beta, own_weights=not plan.in_reward, leaves_out=plan.leaves_out)
    sums = recorder.since_update()
    return {} if sums is None else {**metrics, KL_SUMS: sums.cpu()}
