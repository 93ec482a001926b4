"""`RLOOTrainer`: TRL's own, with the KL in its reward replaced by `kl_plugins.kl_terms`."""

from __future__ import annotations

from typing import Any

import torch
import trl
from torch import Tensor

from kl_plugins.core.reward_scale import reward_scale
from kl_plugins.trl.config import RLOOConfig, RLOOFields, TrainerPair
from kl_plugins.trl.host_beta import host_kl_replaced
from kl_plugins.trl.trainer import KLTrainer
from kl_plugins.trl.vllm import RecordedLogps


class KLInRLOO(KLTrainer):
    """The methods of our `RLOOTrainer`, to be mixed into TRL's own or into a class that derives from it."""

    def start_kl(self) -> None:
        """As `KLTrainer.start_kl`; and with vLLM, ask it for its log-probs, which RLOO doesn't."""
        super().start_kl()
        self._sampling_logps: RecordedLogps | None = None
        if self.kl_spec is not None and self.use_vllm:
            self._sampling_logps = RecordedLogps(self.vllm_generation, pad_to_multiple_of=self.pad_to_multiple_of)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.kl_spec is None or self.beta == 0:
            return super()._generate_and_score_completions(inputs)
        scored: list[Tensor] = []  # TRL scores with the policy, then with the reference, and keeps neither
        with self._logps_seen_by(scored.append, times=2), host_kl_replaced(self, torch.zeros_like):
            output = super()._generate_and_score_completions(inputs)
        output["old_per_token_logps"], output["ref_per_token_logps"] = scored
        if self._exact is not None:
            self._exact.keep_reference(output)
        if self._sampling_logps is not None:
            output["sampling_per_token_logps"] = self._sampling_logps.take(like=scored[0])
        self._rollout_extras(output)
        if self.kl_spec.baseline is not None:
            output["kl_baseline"] = self._rollout_baseline(scored[0], output)
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.kl_spec is None or self.beta == 0:
            return super()._compute_loss(model, inputs)
        inputs = dict(inputs)
        added: list[Tensor] = []

        def see(logp: Tensor) -> None:
            terms, beta = self._terms_of(logp, inputs), self._coefficient(inputs)
            if self.kl_spec.clip == "combined":  # credit "sequence": one coefficient a row, at its counted tokens
                coefficient = (beta * terms.coefficient).sum(-1) / terms.mask.sum(-1).clamp(min=1)
                inputs["advantages"] = inputs["advantages"] - coefficient
            else:
                added.append((beta * terms.loss).sum(-1).mean())

        with self._logps_seen_by(see, times=1, inputs=inputs):
            loss = super()._compute_loss(model, inputs)
        return loss + added[0] if added else loss

    def _reward_scale(self, rewards: Tensor) -> Tensor:
        """(N,) of (N, functions): with `normalize_advantages`, of the rewards less the mean of the group's others."""
        reward, clip = self._scorable(rewards), self.args.reward_clip_range
        reward = reward.clamp(*clip) if clip else reward
        groups = reward.view(-1, self._group_size())
        others = (~groups.isnan()).sum(1, keepdim=True) - 1
        advantages = groups - (groups.nansum(1, keepdim=True) - groups) / others
        return reward_scale(advantages.flatten(), self._group_size(), per="batch")


class RLOOTrainer(KLInRLOO, trl.RLOOTrainer):
    """[`trl.RLOOTrainer`] whose KL-to-reference term is the one that `RLOOConfig(kl=...)` names.

    TRL subtracts `beta * KL`, frozen at rollout, from the reward. Here the reward is left alone, the coefficients are
    recomputed with the current policy, the in-reward ones less a leave-one-out baseline, and the term is summed over
    tokens and averaged over sequences, as RLOO's own loss is. `kl_clip="combined"` (credit `sequence`) puts the
    coefficient into the advantage, under RLOO's own sequence ratio and clip.
    """


PAIR = TrainerPair(
    trainer=trl.RLOOTrainer,
    config=trl.RLOOConfig,
    our_trainer=RLOOTrainer,
    our_config=RLOOConfig,
    methods=KLInRLOO,
    fields=RLOOFields,
)
