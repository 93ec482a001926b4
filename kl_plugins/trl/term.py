"""What all our trainers share, PPO's included: the term that users override, beta's controller, and what is logged."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.utils import logging

from kl_plugins.core.checks import require_policy_scores
from kl_plugins.core.controllers import Controller
from kl_plugins.core.metrics import next_beta
from kl_plugins.core.spec import KLSpec
from kl_plugins.core.terms import KLTerms, kl_terms
from kl_plugins.integration.leave_out import LeaveOut, resolve_leave_out
from kl_plugins.integration.recorder import Recorder
from kl_plugins.trl.controller import BetaCallback

if TYPE_CHECKING:
    from kl_plugins.trl.host import HostTrainer as Host
else:
    Host = object

logger = logging.get_logger(__name__)


def recorder_of(accelerator: Any) -> Recorder:
    """A `Recorder` over the processes of `accelerator`, which in TRL's training all take the same steps."""
    return Recorder(
        sum_over_ranks=partial(accelerator.reduce, reduction="sum"),
        max_over_ranks=lambda x: accelerator.gather(x).max(),
    )


class KLTermMixin(Host):
    """Mixed into a trainer of TRL. `kl_spec` is what `args.kl*` asked for; None leaves every method TRL's own."""

    kl_spec: Any  # KLSpec or None
    kl_controller: Controller
    _kl_left_out: LeaveOut
    _kl_recorder: Recorder
    """Of the training steps."""

    def start_term(self) -> None:
        """Read the options once TRL has made the trainer: the spec, the controller of beta, the tokens left out."""
        self._kl_recorder = recorder_of(self.accelerator)
        spec_of = getattr(self.args, "kl_spec", None)  # absent from TRL's own config
        self.kl_spec = spec_of() if spec_of else None
        if self.kl_spec is None:
            return
        beta = float(getattr(self.args, self.args.kl_beta_field))
        self.set_beta(beta)
        self.kl_controller = self.args.controller(beta)
        if self.args.kl_controller != "fixed":
            self.add_callback(BetaCallback(self, self.kl_controller))
        self._kl_left_out = resolve_leave_out(
            self.args.kl_leave_out,
            tokenizer=getattr(self.processing_class, "tokenizer", self.processing_class),
            eos_token_id=self._kl_eos_token_ids(),
        )

    def compute_kl_terms(
        self, *, logp: Tensor, ref_logp: Tensor, mask: Tensor, behavior_logp: Tensor | None, **more: Any
    ) -> KLTerms:
        """The KL term of a batch of completions. Override it to experiment with terms of your own.

        Args:
            logp: (B, T), nats: the policy's log-probs of the completions' tokens, with their graph in a training step.
            ref_logp: (B, T), nats: the reference's.
            mask: (B, T) of 0 and 1, 1 where the token counts. What the others hold doesn't matter.
            behavior_logp: (B, T), nats: of the policy that drew the tokens; None is on-policy, NaN a token that the
                rollout engine did not score.
            more: Whatever else `kl_plugins.kl_terms` is to get: `baseline` and `group_size`, `exact`, and the
                masks of the tokens that `kl_leave_out` and `kl_leave_out_equal_rewards` leave out.

        Returns:
            `KLTerms`, of which the trainer adds beta times `loss` to its own, reduced as its own is.

        Raises:
            ValueError: For log-probs that are not finite where they count (`kl_nonfinite="drop"` drops the
                reference's, never the policy's).
        """
        require_policy_scores(self.kl_spec, logp=logp, mask=mask, host="TRL")
        return kl_terms(self.kl_spec, logp=logp, ref_logp=ref_logp, mask=mask, behavior_logp=behavior_logp, **more)

    def _kl_eos_token_ids(self) -> Any:
        """A token id, several, or None: those that end a completion besides the tokenizer's own."""
        raise NotImplementedError

    def set_beta(self, beta: float) -> None:
        """Use another coefficient of the KL, in reward per nat, from now on."""
        raise NotImplementedError

    def control_beta(self) -> None:
        """One update of the controller, on the training tokens of all processes since the last one."""
        sums = self._kl_recorder.since_update()
        if sums is not None:
            self.set_beta(next_beta(self.kl_controller, sums))

    def say_gradient(self, *qualifications: str, meaning: str = "") -> None:
        """Log which term is trained and the gradient that it has, as a warning if that is zero or biased.

        What `kl="reverse_kl"` picked, and the `meaning` of its beta, are warnings, too: the level that TRL shows by
        default.
        """
        spec: KLSpec = self.kl_spec
        picked = self.args.kl_choice().sentence
        for said in (picked, meaning):
            if said and self.accelerator.is_main_process:
                (logger.warning if picked else logger.info)(said)
        say = logger.warning if spec.gradient_of in ("zero", "biased") else logger.info
        said = "".join(qualifications)
        say(f"KL term: {spec}; its expected on-policy gradient is {spec.gradient_of}{said}")
