"""In the controller's process (`PPOTrainer`, async: `TrainingActor`): the KL in the reward, baselines, sampling.

Each function here takes one of OpenRLHF's and returns what takes its place; `patches/openrlhf.toml` says which.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kl_plugins.core.advantages import as_costs, token_penalty
from kl_plugins.core.baseline import group_share
from kl_plugins.core.controllers import Controller
from kl_plugins.core.metrics import next_beta
from kl_plugins.core.terms import leave_one_out_baseline
from kl_plugins.integration.leave_out import equal_reward_rows
from kl_plugins.openrlhf import worker
from kl_plugins.openrlhf.actor import (
    KL_SUMS,
    SCALE,
    Host,
    answering,
    terms_of,
    without_baseline,
)
from kl_plugins.openrlhf.hostdata import EQUAL_REWARDS, left_out_of, seeing
from kl_plugins.openrlhf.plan import Plan, plan_of


def make_experience(host: Host) -> Host:
    """`RemoteExperienceMaker.make_experience`: its per-token KL, a negative reward, is that of the plan.

    (B, T), unclamped, 0 at masked positions. OpenRLHF sums it from each token on (`credit="to_go"`), for GAE through
    the critic; with `credit="sequence"` all of it stands where the reward does, at the last token. The reference's
    log-probs stay with the experience, also those of OpenRLHF's own KL in the reward.
    """

    def make(maker: Any, samples_list: list[Any]) -> list[Any]:
        plan = plan_of(maker.args)
        charging = _charging(without_baseline(plan), samples_list) if isinstance(plan, Plan) else nullcontext()
        references: list[Tensor] = []
        with charging, seeing(lambda log_probs, log_probs_base, kl: references.append(log_probs_base)):
            experiences: list[Any] = host(maker, samples_list)
        if plan.in_reward:
            for experience, reference in zip(experiences, references, strict=True):
                experience.base_action_log_probs = reference
        return experiences

    return make


def compute_advantages_and_returns(host: Host) -> Host:
    """`RemoteExperienceMaker.compute_advantages_and_returns`, with the KL's baseline.

    In the reward it is subtracted from what the tokens cost, as OpenRLHF subtracts the reward's, so that whatever
    OpenRLHF does next (it centres some advantages over the batch, and divides them by their deviation) is done to both
    alike. For a KL in the loss it travels to the actor, which subtracts it from the coefficients.
    """

    def compute(maker: Any, experiences: list[Any]) -> list[Any]:
        plan = plan_of(maker.args)
        if not isinstance(plan, Plan):
            return host(maker, experiences)  # type: ignore[no-any-return]
        if plan.in_reward:
            share = _subtract_baseline(plan, experiences)
            experiences = host(maker, experiences)
            scale = share * (_normalization(maker, experiences) if plan.normalized else 1.0)
            for experience in experiences:
                experience.info[SCALE] = torch.full((len(experience.sequences),), scale)
            return experiences
        experiences = host(maker, experiences)
        if plan.leave_out_equal_rewards:
            _mark_equal_rewards(plan, experiences)
        for experience, baseline in zip(experiences, _baselines(plan, experiences), strict=True):
            experience.kl = baseline
        return experiences

    return compute


def dispatch_prompts(host: Host) -> Host:
    """`SamplesGenerator._dispatch_prompts_to_vllm` without `min_tokens=1`.

    vLLM enforces it by making the end-of-sequence token impossible at the first position, so that it samples there
    from another distribution than the one the actor scores. An empty completion is that token alone.
    """

    def dispatch(generator: Any, prompts: list[str], labels: list[str], **kwargs: Any) -> Any:
        if isinstance(plan_of(generator.args), Plan):
            kwargs = {"min_new_tokens": 0, **kwargs}
        references = host(generator, prompts, labels, **kwargs)
        worker.report()
        return references

    return dispatch


def train_step(host: Host) -> Host:
    """`BasePPOTrainer.train_step`, after which beta is updated, if the run has a controller of ours.

    After the first that trained the policy, every process must have proven itself.
    """

    def step(trainer: Any, rollout_samples: list[Any], global_step: int) -> Any:
        plan = plan_of(trainer.args)
        controller = _controller(trainer)
        status, global_step = host(trainer, rollout_samples, global_step)
        sums = status.pop(KL_SUMS, None)
        if controller and sums is not None:
            status["kl/beta"] = next_beta(controller, sums)
        worker.report()
        trained = "policy_loss" in status  # not while only the critic is, nor by a rollout too short for a step
        if trained and not getattr(trainer, "kl_plugins_proven", False):
            actors = len(trainer.actor_model_group._actor_handlers)
            worker.require_proof(plan, actors=actors)
            trainer.kl_plugins_proven = True
        return status, global_step

    return step


def save_logs_and_checkpoints(host: Host) -> Host:
    """`BasePPOTrainer.save_logs_and_checkpoints`, with the state of our controller in the checkpoint."""

    def save(trainer: Any, global_step: int, logs_dict: Any = None, client_states: Any = None) -> None:
        controller = _controller(trainer)
        if controller:
            client_states = {} if client_states is None else client_states  # the best checkpoint is saved from it, too
            client_states[CONTROLLER] = controller.state_dict()
        host(trainer, global_step, logs_dict, client_states)

    return save


def init_checkpoint_states(host: Host) -> Host:
    """`BasePPOTrainer.init_checkpoint_states`, from which our controller continues where it was saved."""

    def load(trainer: Any) -> dict[str, Any]:
        states: dict[str, Any] = host(trainer)
        controller = _controller(trainer)
        if controller and CONTROLLER in states:
            controller.load_state_dict(states[CONTROLLER])
        return states

    return load


CONTROLLER = "kl_controller"


class ControlledKL:
    """What takes the place of OpenRLHF's own controller, which its trainer and its experience maker ask for `value`.

    `controller` is the one that the options of the run have started.
    """

    def __init__(self, controller: Controller) -> None:
        self.controller = controller

    @property
    def value(self) -> float:
        """The coefficient of the KL that is in force, in reward per nat."""
        return self.controller.beta

    def update(self, current: float, n_steps: int) -> None:
        """Do nothing: `train_step` updates the controller with the batch's sums, not with the mean OpenRLHF logs."""


def _controller(trainer: Any) -> Controller | None:
    """Our controller of this run, put into the trainer at first; None if OpenRLHF keeps its own."""
    plan = plan_of(trainer.args)
    if not isinstance(plan, Plan) or plan.controller.kl_controller == "fixed":
        return None
    if not isinstance(trainer.kl_ctl, ControlledKL):
        controller = plan.controller.start(float(trainer.args.algo.kl.init_coef))
        trainer.kl_ctl = trainer.experience_maker.kl_ctl = ControlledKL(controller)
    controlled: ControlledKL = trainer.kl_ctl
    return controlled.controller


def _charging(plan: Plan, samples_list: list[Any]) -> AbstractContextManager[None]:
    """While active, what OpenRLHF asks for is what the plan charges the tokens of one of the samples after another."""
    samples = iter(samples_list)

    def cost(log_probs: Tensor, log_probs_base: Tensor) -> Tensor:
        batch = next(samples)
        batch.action_log_probs = log_probs  # the behavior policy, where vLLM did not report
        return token_penalty(plan.spec, terms_of(plan, batch, log_probs, log_probs_base))

    return answering(cost, expected=len(samples_list) if plan.in_reward else 0)


def _subtract_baseline(plan: Plan, experiences: list[Any]) -> float:
    """From what the tokens of each experience cost. Returns by what is left of a nat: `group_share`."""
    share = group_share(plan.spec.baseline, plan.group_size)
    for experience, baseline in zip(experiences, _baselines(plan, experiences), strict=True):
        if baseline is not None:
            experience.kl = share * (experience.kl - as_costs(baseline, mask=experience.action_mask.bool()))
    return share


def _baselines(plan: Plan, experiences: list[Any]) -> list[Tensor | None]:
    """(B, T) of each experience, from the log-probs at rollout of whole groups, which `index` puts back together."""
    if plan.spec.baseline is None:
        return [None] * len(experiences)
    baselines = [torch.zeros_like(experience.action_log_probs) for experience in experiences]
    tensors = [
        {
            "logp": x.action_log_probs,
            "ref_logp": x.base_action_log_probs,
            "mask": x.action_mask,
            **left_out_of(plan, x),
        }
        for x in experiences
    ]
    for group in _groups(plan, experiences):  # a prompt at a time, for the memory
        whole: dict[str, Any] = {
            name: pad_sequence([tensors[e][name][row] for e, row in group], batch_first=True) for name in tensors[0]
        }
        found = leave_one_out_baseline(plan.spec, **whole, group_size=plan.group_size)
        for baseline, (e, row) in zip(found, group, strict=True):
            length = min(baselines[e].size(1), len(baseline))
            baselines[e][row, :length] = baseline[:length].to(baselines[e].dtype)
    return list(baselines)


def _groups(plan: Plan, experiences: list[Any]) -> Iterator[list[tuple[int, int]]]:
    """The completions of one prompt after the other, as (number of the experience, row in it)."""
    places = sorted((index, e, row) for e, x in enumerate(experiences) for row, index in enumerate(x.index))
    for first in range(0, len(places), plan.group_size):
        yield [(e, row) for _, e, row in places[first : first + plan.group_size]]


def _mark_equal_rewards(plan: Plan, experiences: list[Any]) -> None:
    """Put into each experience which of its rows belong to a group of equal rewards: (B,), 1 or 0."""
    for experience in experiences:
        experience.info[EQUAL_REWARDS] = torch.zeros(len(experience.sequences))
    for group in _groups(plan, experiences):
        rewards = torch.stack([experiences[e].rewards[row] for e, row in group])
        for equal, (e, row) in zip(equal_reward_rows(rewards, len(group)), group, strict=True):
            experiences[e].info[EQUAL_REWARDS][row] = float(equal)


def _normalization(maker: Any, experiences: list[Any]) -> float:
    """What OpenRLHF multiplied the advantages with after it had centred them, read off its own result.

    Where all advantages are equal none of them has a gradient, and it is 0. So it is where they are so nearly equal
    that OpenRLHF's lower bound of the variance sets the factor, and not they themselves.
    """
    before, after, mask = [], [], []
    for e in experiences:
        values = e.action_mask * e.values if maker.advantage_estimator == "gae" else 0
        before.append((e.returns - values).flatten())
        after.append(e.advantages.flatten())
        mask.append(e.action_mask.flatten().bool())
    counted = torch.cat(mask)
    raw, normalized = (torch.cat(x).double()[counted] for x in (before, after))
    centred = raw - raw.mean()
    variance = float(normalized.square().mean())  # 1 but for a bound or, once, rounding
    return float(normalized.norm() / centred.norm()) if variance > 0.99 else 0.0
