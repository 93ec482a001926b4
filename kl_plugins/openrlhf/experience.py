"""In the controller's process (`PPOTrainer`, async: `TrainingActor`): the KL in the reward, baselines, sampling.

Each function here takes one of OpenRLHF's and returns what takes its place; `patches/openrlhf.toml` says which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kl_plugins.openrlhf import worker
from kl_plugins.openrlhf.actor import SCALE, Host, answering, pointwise, terms_of, without_baseline
from kl_plugins.openrlhf.plan import Plan, plan_of
from kl_plugins.terms import leave_one_out_baseline


def make_experience(host: Host) -> Host:
    """`RemoteExperienceMaker.make_experience`: its per-token KL, a negative reward, is that of the plan.

    (B, T), unclamped, 0 at masked positions. OpenRLHF sums it from each token on (`credit="to_go"`), for GAE through
    the critic. The reference's log-probs stay with the experience.
    """

    def make(maker: Any, samples_list: list[Any]) -> list[Any]:
        plan = plan_of(maker.args)
        references: list[Tensor] = []

        def cost(log_probs: Tensor, log_probs_base: Tensor) -> Tensor:
            samples = samples_list[len(references)]
            references.append(log_probs_base)
            samples.action_log_probs = log_probs  # the behavior policy, where vLLM did not report
            return pointwise(plan, terms_of(without_baseline(plan), samples, log_probs, log_probs_base))

        with answering(cost, expected=len(samples_list) if plan.in_reward else 0):
            experiences: list[Any] = host(maker, samples_list)
        if plan.in_reward:
            for experience, reference in zip(experiences, references, strict=True):
                experience.base_action_log_probs = reference
        return experiences

    return make


def compute_advantages_and_returns(host: Host) -> Host:
    """`RemoteExperienceMaker.compute_advantages_and_returns`, and then the leave-one-out baseline of the KL.

    In the reward it joins the advantages, after OpenRLHF has normalized the rewards by group (arXiv 2601.10201) and
    the advantages by batch; for a KL in the loss it travels to the actor, which subtracts it from the coefficients.
    """

    def compute(maker: Any, experiences: list[Any]) -> list[Any]:
        plan = plan_of(maker.args)
        experiences = host(maker, experiences)
        baselines = _baselines(plan, experiences)
        if not plan.in_reward:
            for experience, baseline in zip(experiences, baselines, strict=True):
                experience.kl = baseline
            return experiences
        scale = _normalization(maker, experiences)
        beta = float(maker.kl_ctl.value)
        for experience, baseline in zip(experiences, baselines, strict=True):
            experience.info[SCALE] = torch.full((len(experience.sequences),), scale)
            if baseline is not None:
                experience.advantages = experience.advantages + beta * scale * baseline
        return experiences

    return compute


def dispatch_prompts(host: Host) -> Host:
    """`SamplesGenerator._dispatch_prompts_to_vllm` without `min_tokens=1`.

    vLLM enforces it by making the end-of-sequence token impossible at the first position, so that it samples there
    from another distribution than the one the actor scores. An empty completion is that token alone.
    """

    def dispatch(generator: Any, prompts: list[str], labels: list[str], **kwargs: Any) -> Any:
        plan_of(generator.args)
        references = host(generator, prompts, labels, **{"min_new_tokens": 0, **kwargs})
        worker.report()
        return references

    return dispatch


def train_step(host: Host) -> Host:
    """`BasePPOTrainer.train_step`; after the first that trained the policy, every process must have proven itself."""

    def step(trainer: Any, rollout_samples: list[Any], global_step: int) -> Any:
        result = host(trainer, rollout_samples, global_step)
        worker.report()
        if not getattr(trainer, "kl_plugins_proven", False) and global_step > trainer.args.critic.freezing_steps:
            actors = len(trainer.actor_model_group._actor_handlers)
            worker.require_proof(plan_of(trainer.args), actors=actors)
            trainer.kl_plugins_proven = True
        return result

    return step


def _baselines(plan: Plan, experiences: list[Any]) -> list[Tensor | None]:
    """(B, T) of each experience, from the log-probs at rollout of whole groups, which `index` puts back together."""
    if plan.spec.baseline is None:
        return [None] * len(experiences)
    length = max(experience.action_mask.size(1) for experience in experiences)

    def whole(name: str) -> Tensor:
        rows = [getattr(experience, name) for experience in experiences]
        return torch.cat([pad(row, (0, length - row.size(1))) for row in rows])

    order = torch.tensor([row for experience in experiences for row in experience.index]).argsort()
    baseline = leave_one_out_baseline(
        plan.spec,
        logp=whole("action_log_probs")[order],
        ref_logp=whole("base_action_log_probs")[order],
        mask=whole("action_mask")[order],
        group_size=plan.group_size,
    )[order.argsort()]
    parts = baseline.split([len(experience.sequences) for experience in experiences])
    return [part[:, : e.action_mask.size(1)] for part, e in zip(parts, experiences, strict=True)]


def _normalization(maker: Any, experiences: list[Any]) -> float:
    """What OpenRLHF multiplied the advantages with after it had centred them, read off its own result.

    1 for the estimators that don't; where all advantages are equal, none of them has a gradient, and it is 0.
    """
    if maker.advantage_estimator not in ("gae", "reinforce", "reinforce_baseline"):
        return 1.0
    before, after, mask = [], [], []
    for e in experiences:
        values = e.action_mask * e.values if maker.advantage_estimator == "gae" else 0
        before.append((e.returns - values).flatten())
        after.append(e.advantages.flatten())
        mask.append(e.action_mask.flatten().bool())
    counted = torch.cat(mask)
    raw, normalized = (torch.cat(x).double()[counted] for x in (before, after))
    centred = raw - raw.mean()
    size = centred.norm()
    return float(normalized.norm() / size) if size > 0 else 0.0
