"""`KLMonitorCallback`: what the KL of a TRL trainer does, stock or ours, measured while it trains.

It reads what the trainer computes anyway: the log-probs of its one forward pass, the batch, and its own KL term in the
graph. While it is attached, methods are replaced on that one *instance*; what they return is the trainer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from kl_plugins.core.monitor import (
    coefficient,
    merged,
    monitor_metrics,
    monitor_sums,
    nothing_seen,
    squared_gradient_norms,
)
from kl_plugins.errors import refuse
from kl_plugins.trl.host_beta import HostBeta
from kl_plugins.trl.monitored import (
    check,
    is_exact,
    is_ours,
    is_rloo,
    missing,
    prepared_reference,
    token_classes,
    trainer_that_called,
    without_adapters,
)
from kl_plugins.trl.trainer import completion_mask

logger = logging.get_logger(__name__)

_LOGGED_BY_OURS = ("kl/k1", "kl/k2", "kl/k3")


class KLMonitorCallback(TrainerCallback):
    """Log what the KL of a trainer does: TRL's GRPO, RLOO and GMPO, with TRL's own KL or with one of `kl_plugins`.

    ```python
    trainer = trl.GRPOTrainer(..., callbacks=[KLMonitorCallback()])
    ```

    At every log its `kl/*` numbers (docs/monitoring.md) are among the trainer's own metrics, over
    everything since the last log and all processes; in evaluation with TRL's `eval_` in front. Training is the same,
    bit for bit. At default settings there is no further forward or backward pass through the model, and one device
    sync and one collective a log, so all processes have to log (as `Trainer` does).

    Args:
        reference: For a trainer whose `beta` is 0, which has no reference: a model, a path or hub id, or "base", the
            model that the policy was loaded from (with LoRA: the policy without its adapters, at no memory). It is
            held on each device, in the policy's dtype, and scores under no_grad, one micro-batch at a time. A model
            that is passed is prepared in place, as TRL does with its own (mixed precision, fused LM head).
        every: Train steps from one with such a reference to the next; the others have no KL to it. A scored step
            takes one forward pass more. Evaluation is always scored.
        gradient_ratio_every: Train steps from one measurement of `kl/gradient_ratio` to the next; 0 is never. It takes
            two backward passes more on one micro-batch, and the memory of one more gradient.

    Raises, when training begins: `PatchError` for a trainer or TRL that it doesn't know, `ConfigError` for what can't
    be measured with that trainer.
    """

    def __init__(
        self, *, reference: str | torch.nn.Module | None = None, every: int = 10, gradient_ratio_every: int = 0
    ) -> None:
        problems = [f"every={every!r}: a number of steps, at least 1"] if every < 1 else []
        if gradient_ratio_every < 0:
            problems.append(f"gradient_ratio_every={gradient_ratio_every!r}: a number of steps, or 0 for never")
        refuse(problems)
        self.reference, self.every, self.gradient_ratio_every = reference, every, gradient_ratio_every
        self._trainer: Any = None
        self._replaced: list[tuple[str, Any, Any]] = []  # name, what the instance had (None: its class's), ours
        self._said: set[str] = set()
        self._loaded: Any = None
        self._classes: Any = None
        self._sums: dict[str, Tensor] = {}  # mode -> sums since the last log
        self._call: _Call | None = None
        self._rollout: list[Tensor] | None = None
        self._score_step = self._gradient_step = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the trainer that begins, unless it is attached to it already."""
        trainer = trainer_that_called(args)
        if trainer is not self._trainer:
            self.attach(trainer)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide whether the reference is scored in this step, and `kl/gradient_ratio` measured."""
        step, ratio_every = state.global_step, self.gradient_ratio_every
        self._score_step = step % self.every == 0
        self._gradient_step = ratio_every > 0 and step % ratio_every == 0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach from the trainer, at the end of its training."""
        self.detach()

    def attach(self, trainer: Any) -> None:
        """Watch `trainer` from now on. Training does it by itself; an `evaluate()` on its own needs it.

        Raises:
            PatchError: For a trainer or TRL that it doesn't know.
            ConfigError: For what can't be measured with that trainer.
        """
        self.detach()
        check(trainer, reference=self.reference, gradient_ratio_every=self.gradient_ratio_every)
        self._loaded = prepared_reference(trainer, self.reference)
        self._classes = token_classes(trainer)
        self._said.clear()
        self._trainer = trainer
        self._replace("_compute_loss", self._compute_loss)
        self._replace("_get_per_token_logps_and_entropies", self._score)
        self._replace("log", self._log)
        if is_rloo(trainer):
            self._replace("_generate_and_score_completions", self._generate)
        if is_ours(trainer):
            self._replace("compute_kl_terms", self._compute_kl_terms)
        for what in missing(trainer, self.reference):
            self._say(what)

    def detach(self) -> None:
        """Put the trainer's own methods back and let go of the reference. Without a trainer it does nothing."""
        trainer, self._trainer = self._trainer, None
        for name, before, ours in reversed(self._replaced):
            if vars(trainer).get(name) is not ours:  # ours, somewhere below, now only calls the trainer's own
                logger.warning(f"{name} of the trainer was replaced after KLMonitorCallback did: it is left as it is")
            elif before is None:
                delattr(trainer, name)
            else:
                setattr(trainer, name, before)
        if self._loaded is not None and self._loaded in trainer.accelerator._models:
            trainer.accelerator._models.remove(self._loaded)
        self._loaded = self._classes = None
        self._replaced.clear()
        self._sums.clear()

    def _replace(self, name: str, method: Callable[..., Any]) -> None:
        """Let `trainer.name(...)` be `method(trainer's own, ...)` as long as this is attached to it."""
        trainer = self._trainer
        own = getattr(trainer, name)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            return method(own, *args, **kwargs) if self._trainer is trainer else own(*args, **kwargs)

        replaced.kl_monitor = self  # type: ignore[attr-defined]
        self._replaced.append((name, vars(trainer).get(name), replaced))
        setattr(trainer, name, replaced)

    def _say(self, what: str) -> None:
        """Log once that something isn't available, and why."""
        if what not in self._said and self._trainer.is_world_process_zero():
            logger.warning(f"KLMonitorCallback: not available: {what}")
        self._said.add(what)

    def _mode(self) -> str:
        return "train" if self._trainer.model.training else "eval"

    def _compute_loss(self, own: Callable[..., Tensor], model: Any, inputs: dict[str, Any]) -> Tensor:
        self._call = call = _Call(model)
        try:
            with self._beta_seen_by(call.terms.append):
                loss = own(model, inputs)
        finally:
            self._call = None
        self._observe(loss, call, inputs)
        return loss

    @contextmanager
    def _beta_seen_by(self, see: Callable[[Tensor], None]) -> Iterator[None]:
        """Show `see` the KL term that TRL multiplies with its beta. The product stays what it was."""
        trainer, beta = self._trainer, self._trainer.beta
        if is_ours(trainer) or beta == 0:
            yield
            return

        def product(term: Tensor) -> Tensor:
            see(term)
            own: Tensor = beta * term
            return own

        trainer.beta = HostBeta(beta, product)
        try:
            yield
        finally:
            trainer.beta = beta

    def _compute_kl_terms(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        terms = own(*args, **kwargs)
        if self._call is not None:
            self._call.terms.append(terms.loss)
            self._call.left_out = terms.left_out
        return terms

    def _score(self, own: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's forward pass; if it is due, the reference's on the same tokens goes before a loss's first."""
        call = self._call
        if call is None:
            scored = own(model, *args, **kwargs)
            if self._rollout is not None:
                self._rollout.append(scored[0])
            return scored
        if model is not call.model or call.logp is not None:
            return own(model, *args, **kwargs)
        if self.reference is not None and (self._score_step or self._mode() == "eval"):
            only_logps = kwargs | {"compute_entropy": False, "compute_aux_loss": False}
            reference = nullcontext(self._loaded) if self._loaded is not None else without_adapters(self._trainer)
            with torch.no_grad(), reference as scorer:
                call.ref_logp = own(scorer, *args, **only_logps)[0]
        scored = own(model, *args, **kwargs)
        call.logp = scored[0]
        return scored

    def _generate(self, own: Callable[..., dict[str, Any]], inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """RLOO's rollout, with the log-probs that TRL scored it with and doesn't keep."""
        scored: list[Tensor] = []
        self._rollout = scored
        try:
            output = own(inputs)
        finally:
            self._rollout = None
        names = ["old_per_token_logps", "ref_per_token_logps"] if self._trainer.beta != 0 else ["old_per_token_logps"]
        if len(scored) != len(names):
            self._say(f"the KL and kl/ratio_*: the rollout was scored {len(scored)} times, not {len(names)} times")
            return output
        return dict(zip(names, scored, strict=True)) | output

    def _observe(self, loss: Tensor, call: _Call, inputs: dict[str, Any]) -> None:
        """Add a micro-batch to what the next log reports."""
        logp, mask, ids = call.logp, completion_mask(inputs), inputs["completion_ids"]
        if logp is None or logp.shape != mask.shape:
            self._say("anything: this trainer's loss didn't score the completions of its batch")
            return
        if len(call.terms) > 1:
            self._say(f"kl/dead and kl/gradient_ratio: this trainer's loss has {len(call.terms)} KL terms, not one")
        term = call.terms[0] if len(call.terms) == 1 else None
        sums = monitor_sums(
            logp=logp,
            mask=mask,
            ref_logp=inputs.get("ref_per_token_logps") if call.ref_logp is None else call.ref_logp,
            old_logp=inputs.get("old_per_token_logps"),
            engine_logp=inputs.get("sampling_per_token_logps"),
            classes=self._classes[ids.clamp(max=len(self._classes) - 1)],
            coefficient=coefficient(None if is_exact(self._trainer) else term, logp, mask),
            left_out=call.left_out,
            gradient=self._gradient(loss, term),
        )
        mode = self._mode()
        self._sums[mode] = merged(torch.stack([sums, self._sums[mode]])) if mode in self._sums else sums

    def _gradient(self, loss: Tensor, term: Tensor | None) -> Tensor | None:
        if not self._gradient_step or term is None or not loss.requires_grad:
            return None
        self._gradient_step = False  # one micro-batch a step
        parameters = [p for p in self._trainer.model.parameters() if p.requires_grad]
        squares = squared_gradient_norms(loss, term, parameters)
        if squares is None:
            self._say("kl/gradient_ratio: the KL is no term of the loss (kl_clip='combined')")
        return squares

    def _log(self, own: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        """TRL's, after the `kl/*` numbers have joined its metrics, and with them whatever it reports to."""
        trainer, mode = self._trainer, self._mode()
        device = trainer.accelerator.device
        mine = self._sums.pop(mode, None)
        mine = nothing_seen(device) if mine is None else mine.to(device)
        metrics = monitor_metrics(merged(trainer.accelerator.gather(mine[None])))
        for name, value in metrics.items():
            if name not in _LOGGED_BY_OURS or not is_ours(trainer) or trainer.beta == 0:
                trainer._metrics[mode][name].append(value)
        return own(logs, *args, **kwargs)


@dataclass
class _Call:
    """What one `_compute_loss` of the trainer has shown."""

    model: Any
    logp: Tensor | None = None
    ref_logp: Tensor | None = None
    terms: list[Tensor] = field(default_factory=list)
    left_out: Tensor | None = None


__all__ = ["KLMonitorCallback"]
