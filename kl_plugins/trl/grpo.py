"""`GRPOTrainer`: TRL's own, with `kl_plugins.kl_terms` in the place of its k3."""

from __future__ import annotations

from typing import Any

import torch
import trl
from torch import Tensor

from kl_plugins.trl.config import GRPOConfig, GRPOFields, TrainerPair
from kl_plugins.trl.host_beta import host_kl_replaced
from kl_plugins.trl.trainer import KLTrainer


class KLInGRPO(KLTrainer):
    """The methods of our `GRPOTrainer`, to be mixed into TRL's own or into a class that derives from it."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.kl_spec is None or self.beta == 0:
            return super()._compute_loss(model, inputs)
        inputs = dict(inputs)
        added: list[Tensor] = []

        def see(logp: Tensor) -> None:
            terms, beta = self._terms_of(logp, inputs), self._coefficient(inputs)
            term = beta * terms.loss
            if self.kl_spec.clip == "combined":
                advantages = inputs["advantages"]
                advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
                inputs["advantages"] = advantages - beta * terms.coefficient
                term = torch.zeros_like(term)
            added.append(term)

        def like_the_host(host_kl: Tensor) -> Tensor:
            return self._reduced(added[0], inputs)

        with self._logps_seen_by(see, times=1, inputs=inputs), host_kl_replaced(self, like_the_host):
            return super()._compute_loss(model, inputs)

    def _reduced(self, term: Tensor, inputs: dict[str, Any]) -> Tensor:
        """What this trainer multiplies with beta: the (B, T) `term` itself here, which TRL reduces with its loss."""
        return term

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._exact is not None:
            self._exact.forget()
        output = super()._generate_and_score_completions(inputs)
        self._rollout_extras(output)
        if self._exact is not None and self.beta != 0:
            self._exact.keep_reference(output)
        if self.kl_spec is not None and self.kl_spec.baseline is not None and self.beta != 0:
            output["kl_baseline"] = self._rollout_baseline(self._rollout_logp(output), output)
        return output

    def _rollout_logp(self, output: dict[str, Any]) -> Tensor:
        """(B, T) log-probs at rollout. TRL has them unless the batch is on-policy without vLLM: then score once.

        An exact KL needs the policy's distributions, too, which TRL has if it scored with the old policy.
        """
        enough = self._exact is None or self._exact.scored
        for name in ("sampling_per_token_logps", "old_per_token_logps") if enough else ():
            if name in output:
                logp: Tensor = output[name]
                return logp
        with torch.no_grad():
            logps, _, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
                **{name: output[name] for name in _MULTIMODAL if name in output},
            )
        return logps


class GRPOTrainer(KLInGRPO, trl.GRPOTrainer):
    """[`trl.GRPOTrainer`] whose KL-to-reference term is the one that `GRPOConfig(kl=...)` names.

    TRL scores the completions once with gradients; the term is built from those log-probs and handed back at the
    place where TRL adds `beta * per_token_kl` to its per-token loss, so that every `loss_type` normalizes it as it
    does its own. With `kl_clip="combined"` it goes into the per-token advantage instead, after group normalization.
    """


PAIR = TrainerPair(
    trainer=trl.GRPOTrainer,
    config=trl.GRPOConfig,
    our_trainer=GRPOTrainer,
    our_config=GRPOConfig,
    methods=KLInGRPO,
    fields=GRPOFields,
)

_MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
