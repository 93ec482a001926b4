"""What our GRPO, RLOO and GMPO trainers share: the captured log-probs, the rollout baseline and the metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import logging

from kl_plugins.core.exact import ExactKL
from kl_plugins.core.reward_scale import reward_scale
from kl_plugins.core.terms import KLTerms, leave_one_out_baseline
from kl_plugins.errors import PatchError, refuse
from kl_plugins.integration.leave_out import equal_reward_rows
from kl_plugins.integration.recorder import Recorder
from kl_plugins.integration.reward_scale import meaning_of_beta
from kl_plugins.integration.rules_trl import length_problems
from kl_plugins.integration.sampling import model_generation_problems
from kl_plugins.trl.controller import say_dropped_controller
from kl_plugins.trl.exact import ExactScoring, distribution_problems
from kl_plugins.trl.host_beta import guarded_beta
from kl_plugins.trl.reference import (
    MovingReference,
    adapters_of,
    resumed_reference,
    save_reference,
    start_reference,
    without_hosts_reference,
)
from kl_plugins.trl.term import KLTermMixin, recorder_of
from kl_plugins.trl.vllm import follow_policy_on_cpu, require_processed_logprobs

if TYPE_CHECKING:
    from kl_plugins.trl.host import OnlineTrainer as Host
else:
    Host = object

logger = logging.get_logger(__name__)


class KLTrainer(KLTermMixin, Host):
    """Mixed into a TRL trainer. `kl_spec` is what `args.kl*` asked for; None leaves every method TRL's own."""

    _on_logps: Callable[[Tensor], None] | None = None
    _kl_rewards: Tensor | None = None  # of the rollout at hand, all processes'
    kl_reference: MovingReference | None = None
    _exact: ExactScoring | None = None  # if the KL is summed over the vocabulary
    length_normalized = ""
    """`"gmpo"`: it divides each completion's KL by its own length, whatever its `loss_type`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = [*args, *kwargs.values()]
        self._kl_adapters = adapters_of(given)
        with without_hosts_reference(given):
            super().__init__(*args, **kwargs)
        self.start_kl()

    def start_kl(self) -> None:
        """Do what is to be done once TRL has made the trainer.

        Raises:
            ConfigError: For what only shows once the model is there: a reference, tokens to leave out, generation
                options of the model, or a way of distributing it that the configuration can't have.
        """
        self.start_term()
        self._kl_eval_recorder = recorder_of(self.accelerator)
        if self.use_vllm:
            follow_policy_on_cpu(self.vllm_generation)
        if self.kl_spec is not None:
            self.kl_reference = start_reference(self, self._kl_adapters)
            self._check_sampling()
            if self.kl_spec.loss.exact:
                refuse(distribution_problems(self.kl_spec, self.accelerator))
                self._exact = ExactScoring(self.kl_spec)
            self._say_what_is_trained()

    def _kl_eos_token_ids(self) -> Any:
        """Those of the model's generation config."""
        return getattr(self.model.generation_config, "eos_token_id", None)

    def _check_sampling(self) -> None:
        """Refuse what only shows once the model is there: its own generation options, and a server's log-probs."""
        if self.use_vllm:
            if self.args.vllm_mode == "server" and self.accelerator.is_main_process:
                require_processed_logprobs(self.vllm_generation.vllm_client)
        elif not self.kl_spec.allow_biased:
            refuse(model_generation_problems(self.model.generation_config))

    def _say_what_is_trained(self) -> None:
        kept = " of the tokens that are not left out" if self._kl_left_out.token_ids else ""
        if self.args.kl_leave_out_equal_rewards:
            kept += ", on the groups whose rewards differ (a choice that depends on what was drawn)"
        if self.args.kl_scale == "reward":
            kept += (
                ", each row's divided by the deviation of the rewards that were drawn, as they are (the optimum stays)"
            )
        self.say_gradient(kept, meaning=meaning_of_beta(self.args))
        for problem in length_problems(self.length_normalized, getattr(self.args, "loss_type", None)):
            logger.warning(problem.says)

    def _get_per_token_logps_and_entropies(
        self, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        exact = self._exact if self.beta != 0 else None  # with a beta of 0 no term takes what would be kept
        with nullcontext() if exact is None else exact.recording(*args, **kwargs):
            scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._on_logps is not None:
            self._on_logps(scored[0])
        return scored

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Make a training step as TRL does.

        Raises `PatchError`, before the optimizer's step, if none of our terms was in the loss.
        """
        before = self._kl_recorder.added
        loss = super().training_step(*args, **kwargs)
        if self.kl_spec is not None and self.beta != 0 and self._kl_recorder.added == before:
            raise PatchError(
                f"kl={self.kl_spec.name!r} was asked for, but the loss of {type(self).__name__} was computed without "
                "it: a subclass must call the compute_loss and _compute_loss of kl_plugins.trl"
            )
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.kl_spec is not None:
            save_reference(self, trial, self.kl_reference)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        if self.kl_spec is None:
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
            return
        folder = Path(resume_from_checkpoint)
        with resumed_reference(self, folder, self.kl_reference):
            say_dropped_controller(self.args, folder)
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    @contextmanager
    def _logps_seen_by(
        self, see: Callable[[Tensor], None], times: int, inputs: dict[str, Any] | None = None
    ) -> Iterator[None]:
        """Show `see` the (B, T) log-probs that the host's own forward passes return while this is active.

        With the `inputs` of a micro-batch, an exact KL to the reference is made in these passes.
        """
        seen = []

        def on_logps(logps: Tensor) -> None:
            seen.append(logps.shape)
            see(logps)

        self._on_logps = on_logps
        try:
            with nullcontext() if self._exact is None else self._exact.compared(inputs):
                yield
        finally:
            self._on_logps = None
        if len(seen) != times:
            raise PatchError(
                f"{type(self).__name__} was expected to score the completions {times} times here, found {len(seen)}: "
                "install a tested version of TRL or set kl=None"
            )

    def _terms_of(self, logp: Tensor, inputs: dict[str, Any]) -> KLTerms:
        """The KL term of a micro-batch, from the live (B, T) `logp` of the host's own forward pass; it is recorded.

        The behavior policy is the rollout engine where it reported log-probs, else the old policy, else (on-policy)
        the current one.
        """
        if "ref_per_token_logps" not in inputs:
            raise ValueError("beta was 0 when these completions were generated, so the reference did not score them")
        mask = completion_mask(inputs)
        terms = self.compute_kl_terms(
            logp=logp,
            ref_logp=inputs["ref_per_token_logps"],
            mask=mask,
            behavior_logp=inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps")),
            baseline=inputs.get("kl_baseline"),
            group_size=int(self.num_generations) if "kl_baseline" in inputs else None,
            exact=None if self._exact is None else self._exact.kl(mask, inputs["kl_ref_hidden"]),
            **self._left_out(inputs),
        )
        self._recorder().add(terms, self._coefficient(inputs))
        return terms

    def _coefficient(self, inputs: dict[str, Any]) -> float | Tensor:
        """Beta; with `kl_scale="reward"` (B, 1), times what the host has multiplied each row's reward with."""
        beta = float(self.beta)
        return beta * inputs["kl_scale"].unsqueeze(1) if "kl_scale" in inputs else beta

    def _left_out(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The masks of `kl_leave_out` and `kl_leave_out_equal_rewards`, (B, T) each; empty if nothing is left out."""
        return self._kl_left_out.masks(
            inputs["completion_ids"], completion_mask(inputs), rows=inputs.get("kl_equal_rewards")
        )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._kl_rewards = super()._calculate_rewards(*args, **kwargs)
        return self._kl_rewards

    def _rollout_extras(self, output: dict[str, Any]) -> None:
        """Add to a rollout what is known while its groups are whole: whose rewards are equal, and their scale."""
        if self.kl_spec is None or self.beta == 0:
            return
        found: dict[str, Tensor] = {}
        if self.args.kl_leave_out_equal_rewards:
            rewards = self._weighted_rewards(self._rewards_of(output, "kl_leave_out_equal_rewards"))
            found["kl_equal_rewards"] = equal_reward_rows(rewards, self._group_size())
        if self.args.kl_scale == "reward":
            found["kl_scale"] = self._reward_scale(self._rewards_of(output, "kl_scale"))
        rows = len(output["completion_ids"])
        first = rows * self.accelerator.process_index
        for name, of_all in found.items():
            output[name] = of_all[first : first + rows].to(output["completion_ids"].device)

    def _rewards_of(self, output: dict[str, Any], option: str) -> Tensor:
        """(N, functions), all processes' of this rollout, for an `option` that needs them."""
        rows = len(output["completion_ids"]) * self.accelerator.num_processes
        if self._kl_rewards is None or len(self._kl_rewards) != rows:
            raise PatchError(
                f"{option}: the rewards of this rollout were not seen; install a tested version of TRL (a subclass "
                "must call _calculate_rewards) or leave the option out"
            )
        return self._kl_rewards

    def _reward_scale(self, rewards: Tensor) -> Tensor:
        """(N,) of (N, functions): what this trainer multiplies its advantages with."""
        return reward_scale(self._scorable(rewards), self._group_size(), per=self.args.scale_rewards)

    def _scorable(self, rewards: Tensor) -> Tensor:
        """(N,) of (N, functions): the reward as TRL sums it, NaN where no function gave one."""
        return self._weighted_rewards(rewards).masked_fill(rewards.isnan().all(1), torch.nan)

    def _weighted_rewards(self, rewards: Tensor) -> Tensor:
        """(N,) of (N, functions): the reward as TRL sums it; (N, functions) if it normalizes each one first."""
        weights = self.reward_weights.to(rewards)
        if getattr(self.args, "multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
            return rewards[:, weights != 0]
        return (rewards * weights).nansum(dim=1)

    def _group_size(self) -> int:
        return int(self.num_generations if self.model.training else self.num_generations_eval)

    def _rollout_baseline(self, logp: Tensor, inputs: dict[str, Any]) -> Tensor:
        """(B, T) leave-one-out baselines from the log-probs at rollout.

        Computed before the host shuffles the batch and splits it, where groups are whole, also across processes. They
        are functions of *other* samples, so that it doesn't matter that the policy has moved on when they are used.
        """
        ref_logp, mask = inputs["ref_per_token_logps"], completion_mask(inputs)
        exact = {}
        if self._exact is not None:
            with torch.no_grad():
                exact["exact"] = self._exact.kl(mask, inputs["kl_ref_hidden"]).value
        logp = torch.where(logp.isnan(), ref_logp, logp)  # a token the engine did not score
        group_size = self._group_size()
        if group_size < 2:  # evaluation may generate one completion a prompt
            return torch.zeros_like(logp)
        rows, length = mask.shape
        tensors = {"logp": logp, "ref_logp": ref_logp, "mask": mask, **exact, **self._left_out(inputs)}
        pooled = torch.stack([tensor.to(logp.dtype) for tensor in tensors.values()], dim=-1)
        pooled = self.accelerator.gather(self.accelerator.pad_across_processes(pooled, dim=1))
        whole: dict[str, Any] = dict(zip(tensors, pooled.unbind(-1), strict=True))
        if "exact" in whole:
            kl = whole["exact"]
            whole["exact"] = ExactKL(value=kl, outside=torch.zeros_like(kl).bool(), of=self.kl_spec.loss.exact)
        baseline = leave_one_out_baseline(self.kl_spec, **whole, group_size=group_size)
        first = rows * self.accelerator.process_index
        return baseline[first : first + rows, :length]

    def set_beta(self, beta: float) -> None:
        """Use another coefficient, in reward per nat, from the next micro-batch on."""
        self.beta = guarded_beta(beta)

    def kl_metrics(self) -> dict[str, float]:
        """The `kl/*` numbers of `core.metrics` since the last log, of training or evaluation, whichever is going on.

        Over all processes, which all have to call it; empty if there was no step.
        """
        if self.kl_spec is None:
            return {}
        return self._recorder().metrics(
            beta=float(self.beta),
            own_weights=self.kl_spec.clip != "combined",  # else TRL's own ratio and clip apply, and are logged by TRL
            leaves_out=self.args.leaves_out(),
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as TRL does, after the `kl/*` numbers have joined TRL's metrics (in evaluation as `eval_kl/*`)."""
        mode = "train" if self.model.training else "eval"
        for name, value in self.kl_metrics().items():
            self._metrics[mode][name].append(value)
        super().log(logs, *args, **kwargs)

    def _recorder(self) -> Recorder:
        return self._kl_recorder if self.model.training else self._kl_eval_recorder


def completion_mask(inputs: dict[str, Any]) -> Tensor:
    """(B, T). Which tokens of a batch the policy drew: not padding, not a tool's."""
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
