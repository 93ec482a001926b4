"""What our GRPO and RLOO trainers share: the captured log-probs, the rollout baseline and the metrics."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from kl_plugins.errors import PatchError
from kl_plugins.metrics import kl_metrics, kl_sums
from kl_plugins.terms import KLTerms, kl_terms, leave_one_out_baseline
from kl_plugins.trl.vllm import follow_policy_on_cpu

logger = logging.get_logger(__name__)


class KLTrainer:
    """Mixed into a TRL trainer. `kl_spec` is what `args.kl*` asked for; None leaves every method TRL's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._on_logps: Callable[[Tensor], None] | None = None
        super().__init__(*args, **kwargs)
        spec_of = getattr(self.args, "kl_spec", None)  # absent from TRL's own config
        self.kl_spec: Any = spec_of() if spec_of else None  # KLSpec or None
        self.beta = float(self.beta)
        if self.use_vllm:
            follow_policy_on_cpu(self.vllm_generation)
        if self.kl_spec is not None:
            say = logger.warning if self.kl_spec.gradient_of in ("zero", "biased") else logger.info
            say(f"KL term: {self.kl_spec}; its expected on-policy gradient is {self.kl_spec.gradient_of}")

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._on_logps is not None:
            self._on_logps(scored[0])
        return scored

    @contextmanager
    def _logps_seen_by(self, see: Callable[[Tensor], None], times: int):
        """Show `see` the (B, T) log-probs that the host's own forward passes return while this is active."""
        seen = []

        def on_logps(logps: Tensor) -> None:
            seen.append(logps.shape)
            see(logps)

        self._on_logps = on_logps
        try:
            yield
        finally:
            self._on_logps = None
        if len(seen) != times:
            raise PatchError(
                f"{type(self).__name__} was expected to score the completions {times} times here, found {len(seen)}: "
                "install a tested version of TRL or set kl=None"
            )

    def compute_kl_terms(self, logp: Tensor, inputs: dict[str, Any]) -> KLTerms:
        """The KL term of a micro-batch, from the live (B, T) `logp` of the host's own forward pass.

        The behavior policy is the rollout engine where it reported log-probs, else the old policy, else (on-policy)
        the current one. Override it to experiment with terms of your own.
        """
        return kl_terms(
            self.kl_spec,
            logp=logp,
            ref_logp=inputs["ref_per_token_logps"],
            mask=_mask(inputs),
            behavior_logp=inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps")),
            baseline=inputs.get("kl_baseline"),
        )

    def _rollout_baseline(self, logp: Tensor, inputs: dict[str, Any]) -> Tensor:
        """(B, T) leave-one-out baselines from the log-probs at rollout.

        Computed before the host shuffles the batch and splits it, where groups are whole, also across processes. They
        are functions of *other* samples, so that it doesn't matter that the policy has moved on when they are used.
        """
        ref_logp, mask = inputs["ref_per_token_logps"], _mask(inputs)
        logp = torch.where(logp.isnan(), ref_logp, logp)  # a token the engine did not score
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        if group_size < 2:  # evaluation may generate one completion a prompt
            return torch.zeros_like(logp)
        rows, length = mask.shape
        pooled = torch.stack([logp, ref_logp, mask.to(logp.dtype)], dim=-1)
        pooled = self.accelerator.gather(self.accelerator.pad_across_processes(pooled, dim=1))
        logp, ref_logp, mask = pooled.unbind(-1)
        baseline = leave_one_out_baseline(self.kl_spec, logp=logp, ref_logp=ref_logp, mask=mask, group_size=group_size)
        first = rows * self.accelerator.process_index
        return baseline[first : first + rows, :length]

    def _log_kl(self, terms: KLTerms) -> None:
        mode = "train" if self.model.training else "eval"
        sums = self.accelerator.reduce(kl_sums(terms), reduction="sum")
        weight_max = self.accelerator.gather(terms.weight.max()).max()
        for name, value in kl_metrics(sums, weight_max=weight_max, beta=float(self.beta)).items():
            self._metrics[mode][name].append(value)


def _mask(inputs: dict[str, Any]) -> Tensor:
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
