"""`PPOConfig` and `PPOTrainer` for the TRL releases that have a `PPOTrainer` (`trl.experimental.ppo`, until 1.12).

TRL's PPO is one method, `train`, with the KL in its middle. It is compiled anew with four of its statements changed
(`EDITS`), for the subclass below only; `patches/trl.toml` says which versions of it were tested.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kl_plugins.core.advantages import refresh_advantages, token_penalty
from kl_plugins.errors import PatchError, refuse
from kl_plugins.integration.options import PPOOptions
from kl_plugins.integration.problem import WAIVER, Problem
from kl_plugins.integration.rules_trl import ppo_problems
from kl_plugins.integration.sampling import model_generation_problems
from kl_plugins.patching import load_patches
from kl_plugins.patching.rewrite import HOST, Edit, edited
from kl_plugins.patching.versions import installed_version
from kl_plugins.trl.config import KLConfigMixin, TrainerPair, check_trl, documented
from kl_plugins.trl.term import KLTermMixin

try:
    from trl.experimental import ppo as host
except ImportError as error:
    newest = load_patches("trl", "ppo").tested[-1]
    raise PatchError(
        f"kl_plugins.trl.ppo was imported, but trl {installed_version('trl') or '(not installed)'} has no "
        f"PPOTrainer that can be imported ({error}): TRL dropped it after {newest}; install trl=={newest}"
    ) from error

if TYPE_CHECKING:
    from kl_plugins.trl.host import PPOHostTrainer as Host
else:
    Host = object

_MASK = "~padding_mask"
_MICRO = "mb_logprobs, ref_logprobs[micro_batch_inds], ~padding_mask[micro_batch_inds]"
_TERM = f"self._kl_term(new_logprobs, {_MICRO}, mb_responses)"
EDITS = (
    # The KL in the reward.
    Edit(
        name="non_score_reward",
        digest="9b3585d14088893d",
        value=f"self._kl_reward(logprobs, ref_logprobs, {_MASK})",
    ),
    # Whitening scales it with the advantages.
    Edit(name="advantages", digest="6d9e9be2e0cce426", value=f"self._kl_whitened(advantages, {HOST}, {_MASK})"),
    # Each update has a policy of its own.
    Edit(
        name="pg_losses",
        digest="b3b07f177293290c",
        before=f"mb_advantage = self._kl_advantages(mb_advantage, new_logprobs, {_MICRO})",
    ),
    # The KL in the loss, by the mean over tokens that the policy's own loss is reduced with.
    Edit(
        name="loss",
        digest="cbf9b759cae3cd96",
        value=f"{HOST} + masked_mean({_TERM}, ~padding_mask[micro_batch_inds])",
    ),
    # Not changed, but what the above stands on.
    Edit(name="padding_mask", digest="f92be7f50d8ddff1"),
    Edit(name="logprobs", digest="a8271a02007e8dd5"),
    Edit(name="ref_logprobs", digest="e932cdd29045e1fa"),
    Edit(name="rewards", digest="dfb8c8df2c5d25a9"),
    Edit(name="lastgaelam", digest="b2607cc548b2c46a"),
    Edit(name="micro_batch_inds", digest="ddb587d5f02a3eec"),
    Edit(name="mb_advantage", digest="72a054ff72825ba6"),
    Edit(name="mb_logprobs", digest="5461ed6ace009bb1"),
    Edit(name="mb_responses", digest="b18058e895b960d4"),
    Edit(name="new_logprobs", digest="62ff509be18f0fc9"),
    Edit(name="pg_loss", digest="2281dc66ebd38ef4"),
)


def edited_train(train: Any) -> FunctionType:
    """TRL's `PPOTrainer.train` with `EDITS` applied. `PatchError` if one of its statements isn't as it was tested."""
    return edited(train, EDITS)


@functools.cache
def train_with_kl() -> FunctionType:
    """`edited_train` of the installed TRL. `PatchError` unless version, digest and signature are tested ones.

    `KL_PLUGINS_ALLOW_UNTESTED=1` accepts another version with a digest and signature that were tested.
    """
    check_trl("ppo")
    return edited_train(host.PPOTrainer.train)


class GuardedBeta(float):
    """A `kl_coef` with `kl` set: TRL's own trainer, which would train on its own KL, raises where it negates it."""

    def __neg__(self) -> float:
        raise PatchError(
            "kl is set in a kl_plugins.trl.ppo.PPOConfig, but TRL's own KL was about to be used: use "
            "kl_plugins.trl.ppo.PPOTrainer (a subclass must call its train), or set kl=None"
        )


@dataclass
class PPOFields(PPOOptions, KLConfigMixin):
    """What `PPOConfig` has besides TRL's fields; TRL's `kl_coef` is the coefficient of the KL (beta)."""

    kl_beta_field = "kl_coef"

    def _check_host(self) -> None:
        train_with_kl()

    def _guarded(self, beta: float) -> float:
        return GuardedBeta(beta)

    def _problems(self) -> Iterator[Problem]:
        return ppo_problems(self)


@documented
@dataclass
class PPOConfig(PPOFields, host.PPOConfig):
    """[`trl.experimental.ppo.PPOConfig`] with the KL that `kl` names; without one it is TRL's own."""


class KLInPPO(KLTermMixin, Host):
    """The methods of our `PPOTrainer`, to be mixed into TRL's own or into a class that derives from it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start_kl()

    def start_kl(self) -> None:
        """Do what is to be done once TRL has made the trainer.

        Raises `ConfigError` for tokens to leave out, or generation options of the model, that can't be.
        """
        self._kl_scale: Tensor | None = None
        self._kl_moved = False  # whether the policy was updated since the rollout
        self.start_term()
        if self.kl_spec is not None:
            if not self.kl_spec.allow_biased:
                refuse(_generation_problems(self.policy_model.generation_config))
            self.say_gradient()

    def train(self) -> None:
        """Train as TRL does; with `kl` set, by TRL's own method with the four statements of `EDITS` changed.

        Raises `PatchError` if one of them is not as it was tested.
        """
        if self.kl_spec is None:
            super().train()
        else:
            train_with_kl()(self)

    def _kl_reward(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
        """(B, T). What the KL adds to the rewards of a rollout: minus its cost, or 0 if it is in the loss."""
        self._kl_moved = False
        if not self.args.kl_in_reward:
            return torch.zeros_like(logp)
        terms = self.compute_kl_terms(logp=logp, ref_logp=ref_logp, mask=mask, behavior_logp=logp)
        return -self.kl_beta * token_penalty(self.kl_spec, terms)

    def _kl_whitened(self, raw: Tensor, whitened: Tensor, mask: Tensor) -> Tensor:
        """`whitened`, TRL's own, after what it multiplied the (B, T) advantages with was read off it.

        Where all advantages are equal none of them has a gradient, and the scale is 0.
        """
        raw, result = raw[mask].double(), whitened[mask].double()
        size = (raw - raw.mean()).norm()
        self._kl_scale = torch.where(size > 0, result.norm() / size, 0.0)
        return whitened

    def _kl_advantages(
        self, advantages: Tensor, logp: Tensor, old_logp: Tensor, ref_logp: Tensor, mask: Tensor
    ) -> Tensor:
        """(B, T) advantages of a micro-batch with the KL of the current policy in them; see `refresh_advantages`."""
        if not self.args.kl_in_reward:
            return advantages
        rollout = {"ref_logp": ref_logp, "mask": mask, "behavior_logp": old_logp}
        now = self.compute_kl_terms(logp=logp, **rollout)
        self._kl_recorder.add(now, self.kl_beta)
        if not self._kl_moved:  # the policy is that of the rollout: nothing but rounding has changed
            self._kl_moved = self.accelerator.sync_gradients  # of this micro-batch comes an update
            return advantages
        assert self._kl_scale is not None  # they were whitened
        then = self.compute_kl_terms(logp=old_logp, **rollout)
        return refresh_advantages(
            advantages,
            spec=self.kl_spec,
            now=now,
            then=then,
            discount=self.args.gamma * self.args.lam,
            scale=self.kl_beta * self._kl_scale.to(advantages.dtype),
            normalized=True,
        )

    def _kl_term(self, logp: Tensor, old_logp: Tensor, ref_logp: Tensor, mask: Tensor, token_ids: Tensor) -> Tensor:
        """(B, T). What the KL adds to the loss of each token of a micro-batch: 0 if it is in the reward."""
        if self.args.kl_in_reward:
            return torch.zeros_like(logp.detach())
        terms = self.compute_kl_terms(
            logp=logp,
            ref_logp=ref_logp,
            mask=mask,
            behavior_logp=old_logp,
            **self._kl_left_out.masks(token_ids, mask),
        )
        self._kl_recorder.add(terms, self.kl_beta)
        return self.kl_beta * terms.loss

    def _kl_eos_token_ids(self) -> Any:
        """The token at which TRL's PPO ends a completion, or None."""
        return self.stop_token_id

    def set_beta(self, beta: float) -> None:
        """Use another coefficient, in reward per nat, from the next rollout on."""
        self.kl_beta = beta

    def kl_metrics(self) -> dict[str, float]:
        """The `kl/*` numbers since the last log, over all processes; empty if there was no update of the policy.

        Besides those of `core.metrics`, for a KL in the reward, `kl/advantage_scale`: what whitening has multiplied a
        nat in the advantages with. All processes have to call it.
        """
        if self.kl_spec is None:
            return {}
        in_reward = self.args.kl_in_reward
        metrics = self._kl_recorder.metrics(
            beta=self.kl_beta, own_weights=not in_reward, leaves_out=self.args.leaves_out()
        )
        if metrics and in_reward and self._kl_scale is not None:
            metrics["kl/advantage_scale"] = self.accelerator.gather(self._kl_scale).mean().item()
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as TRL does, with the `kl/*` numbers among `logs`."""
        super().log({**logs, **self.kl_metrics()}, *args, **kwargs)


class PPOTrainer(KLInPPO, host.PPOTrainer):
    """[`trl.experimental.ppo.PPOTrainer`] whose KL-to-reference is the one that `PPOConfig(kl=...)` names.

    In the reward (`k1_in_reward`): per token, unclamped, through GAE and the critic, under TRL's ratio and clip.
    TRL's advantages hold the KL of the policy at rollout; before each later update on the same rollout they are
    brought up to date. In the loss: `kl_coef` times the token mean of `kl_terms(...)`, weighted against the policy
    at rollout by the log-probs of its own sampler, while the KL in the reward is off. `kl=None` is TRL's own trainer.
    """


PAIR = TrainerPair(
    trainer=host.PPOTrainer,
    config=host.PPOConfig,
    our_trainer=PPOTrainer,
    our_config=PPOConfig,
    methods=KLInPPO,
    fields=PPOFields,
)


def _generation_problems(generation_config: Any) -> list[str]:
    """What in a model's own `generation_config` makes TRL sample from, and score with, something else."""
    problems = model_generation_problems(generation_config)
    for name in ("repetition_penalty", "encoder_repetition_penalty"):
        value = getattr(generation_config, name, None)
        if value not in (None, 1.0):
            problems.append(
                f"the model's generation_config.{name}={value!r} changes the distribution that tokens are drawn from, "
                f"which biases every sampled KL; reset it{WAIVER}"
            )
    return problems
