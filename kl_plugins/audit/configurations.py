"""The KL terms that an audit compares: every configuration of `kl_plugins`, and what installed hosts do themselves.

Each is a function from the log-probs of sampled tokens to what multiplies their scores. A host's own function is
called and differentiated; where it can't be, its formula stands for it, and the row says so.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kl_plugins.core.estimators import k1
from kl_plugins.core.exact import ExactKL
from kl_plugins.core.registry import all_losses
from kl_plugins.core.spec import OFF_POLICY, KLSpec
from kl_plugins.core.terms import assign_credit, kl_terms
from kl_plugins.patching.versions import installed_version

# In the loss: what compute_approx_kl is asked for. In the reward: the values of these estimators.
OPENRLHF_ESTIMATORS = ("k1", "k2", "k3")
VERL_PENALTIES = ("kl", "mse", "low_var_kl", "low_var_kl+")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the policy's log-probs (live), the reference's and the behavior policy's, each (B, T), to a (B, T) loss."""
Pointwise = Callable[[Tensor, Tensor], Tensor]
"""From the policy's and the reference's log-probs, (B, T), to (B, T) coefficients, elementwise."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a term sees of completions: (B, T) tensors, as in `kl_plugins.kl_terms`, nats."""

    logp: Tensor
    ref_logp: Tensor
    mask: Tensor
    behavior_logp: Tensor | None
    host_behavior_logp: Tensor | None
    kl: Tensor
    """The exact next-token KL(policy || reference), 0 where the token doesn't count."""

    def host_old(self) -> Tensor:
        """The old log-probs that a host's function gets."""
        return self.logp if self.host_behavior_logp is None else self.host_behavior_logp


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """What a term multiplies a token's gradients with, (B, T) each."""

    score: Tensor
    """Of the score grad log pi(y_t)."""
    local: Tensor
    """Of the gradient of the exact next-token KL at the token's prefix."""
    weight: Tensor | None = None
    """The importance weight, where the term has one of its own."""
    cut: Tensor | None = None
    """bool: where that was truncated."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One row of the audit."""

    name: str
    """Of the loss, or host and setting."""
    credit: str = ""
    off_policy: str = ""
    """Empty where there is nothing to choose: on-policy, or a host's own way."""
    origin: str
    """Which function was run, or the formula that stands for one that wasn't."""
    gradient_of: str = ""
    """The divergence that the name promises; empty for hosts, who promise a KL."""
    refused: bool = False
    """Refused by kl_plugins unless `allow_biased`."""
    coefficients: Callable[[Tokens], Coefficients]
    pointwise: Pointwise
    """The coefficient of a token by itself, on-policy."""
    later: bool = False
    """Whether a token answers for those after it, too."""
    weighted: bool = False
    """Whether samples of another policy are weighted for the token's ratio."""
    analytic: bool = False
    """Whether the sum over next tokens is taken instead of a sample, so that none is too rare to be drawn."""

    @property
    def label(self) -> str:
        """All that tells it from the others, in one line."""
        return ", ".join(part for part in (f"{self.name} {self.credit}".strip(), self.off_policy) if part)


def own_configurations(*, off_policy: bool) -> list[Configuration]:
    """Those of kl_plugins, refused ones too, with every credit; off-policy with every kind of weight."""
    kinds = OFF_POLICY if off_policy else ("",)
    found = []
    for name, loss in all_losses().items():
        if loss.exact == "forward_kl":  # the analytic part that is sketched is that of the reverse KL
            continue
        for credit in loss.gradient_of:
            for kind in kinds:
                spec = KLSpec(name=name, credit=credit, off_policy=kind or "none", allow_biased=True)
                found.append(
                    Configuration(
                        name=name,
                        credit=credit,
                        off_policy=kind,
                        origin="kl_plugins.kl_terms",
                        gradient_of=spec.gradient_of,
                        refused=spec.gradient_of in ("zero", "biased"),
                        coefficients=_exact(spec) if loss.exact else _ours(spec),
                        pointwise=_of_log_ratio(k1 if loss.exact else loss.coefficient),  # of the same mean
                        later=credit != "token",
                        weighted=kind != "none",
                        analytic=bool(loss.exact),
                    )
                )
    return found


def host_configurations() -> tuple[list[Configuration], list[str]]:
    """What TRL, OpenRLHF and verl do themselves, by their own functions where they can be imported; and what can't."""
    found, left_out = [], []
    for host in (_trl, _openrlhf, _verl):
        rows, problem = host()
        found += rows
        left_out += [problem] if problem else []
    return found, left_out


@cache
def _of_log_ratio(coefficient: Callable[[Tensor], Tensor]) -> Pointwise:
    return lambda logp, ref_logp: coefficient(logp - ref_logp)


def _ours(spec: KLSpec) -> Callable[[Tokens], Coefficients]:
    def coefficients(tokens: Tokens) -> Coefficients:
        terms = kl_terms(
            spec,
            logp=tokens.logp,
            ref_logp=tokens.ref_logp,
            mask=tokens.mask,
            behavior_logp=tokens.behavior_logp,
        )
        score = terms.score_coefficient
        return Coefficients(score=score, local=torch.zeros_like(score), weight=terms.weight, cut=terms.cut)

    return coefficients


def _exact(spec: KLSpec) -> Callable[[Tokens], Coefficients]:
    """What `kl_terms` makes of the exact next-token KLs: the weight of each one's gradient, and of the scores."""

    def coefficients(tokens: Tokens) -> Coefficients:
        with torch.enable_grad():
            kl = tokens.kl.detach().clone().requires_grad_()
            terms = kl_terms(
                spec,
                logp=tokens.logp,
                ref_logp=tokens.ref_logp,
                mask=tokens.mask,
                behavior_logp=tokens.behavior_logp,
                exact=ExactKL(value=kl, outside=torch.zeros_like(tokens.mask), of="reverse_kl"),
            )
            (local,) = torch.autograd.grad(terms.loss.sum(), kl)
        return Coefficients(score=terms.score_coefficient, local=local, weight=terms.weight, cut=terms.cut)

    return coefficients


def in_loss(name: str, origin: str, loss: Loss, *, weighted: bool = False) -> Configuration:
    """A host's loss per token: its coefficients are its derivative."""

    def derivative(logp: Tensor, ref_logp: Tensor, old_logp: Tensor) -> Tensor:
        with torch.enable_grad():
            live = logp.detach().clone().requires_grad_()
            (found,) = torch.autograd.grad(loss(live, ref_logp, old_logp).sum(), live)
        return found

    def coefficients(tokens: Tokens) -> Coefficients:
        # Where logp, ref_logp and old_logp are equal no KL has a gradient.
        drawn = (torch.where(tokens.mask, x, 0.0) for x in (tokens.logp, tokens.ref_logp, tokens.host_old()))
        score = derivative(*drawn) * tokens.mask
        return Coefficients(score=score, local=torch.zeros_like(score))

    return Configuration(
        name=name,
        origin=origin,
        coefficients=coefficients,
        pointwise=lambda logp, ref_logp: derivative(logp, ref_logp, logp.detach()),
        weighted=weighted,
    )


def in_reward(name: str, origin: str, value: Pointwise) -> Configuration:
    """A host's penalty in the reward, frozen at rollout: its sum from the token on, times the ratio."""

    def coefficients(tokens: Tokens) -> Coefficients:
        old = tokens.host_old()
        later = assign_credit(torch.where(tokens.mask, value(old, tokens.ref_logp), 0.0), "to_go")
        score = torch.where(tokens.mask, (tokens.logp - old).exp(), 0.0) * later
        return Coefficients(score=score, local=torch.zeros_like(score))

    return Configuration(name=name, origin=origin, coefficients=coefficients, pointwise=value, later=True)


def _trl() -> tuple[list[Configuration], str]:
    settings = {"TRL GRPO": True, "TRL GRPO, plain k3": False}
    try:
        with _quiet():
            import trl

            from kl_plugins.explain.curves import host_loss

            def run(corrected: bool) -> Loss:
                def loss(logp: Tensor, ref_logp: Tensor, old_logp: Tensor) -> Tensor:
                    mean = host_loss(
                        trl.GRPOTrainer, logp, ref_logp=ref_logp, old_logp=old_logp, use_bias_correction_kl=corrected
                    )
                    return len(logp) * mean  # over rows, of sums over tokens

                return loss

            zeros = torch.zeros(2, 3)
            run(True)(zeros.clone().requires_grad_(), zeros, zeros)
    except (ImportError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        how = "formula of TRL 1.16, read from its source; not run"
        rows = [
            in_loss(name, how, _trl_formula(corrected), weighted=corrected) for name, corrected in settings.items()
        ]
        return rows, f"TRL is not run, its formula stands for it: {_first_line(error)}"
    how = f"trl {trl.__version__}: GRPOTrainer._compute_loss, run on a stub of a trainer, use_bias_correction_kl="
    rows = [in_loss(name, f"{how}{on}", run(on), weighted=on) for name, on in settings.items()]
    return rows, ""


def _trl_formula(corrected: bool) -> Loss:
    def loss(logp: Tensor, ref_logp: Tensor, old_logp: Tensor) -> Tensor:
        k3 = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
        return k3 * torch.exp(logp - old_logp) if corrected else k3

    return loss


def _openrlhf() -> tuple[list[Configuration], str]:
    try:
        with _quiet():
            from openrlhf.models.utils import compute_approx_kl
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        where = "; without a GPU put recipes/openrlhf_cpu on PYTHONPATH" if "flash_attn" in str(error) else ""
        return [], _not_imported("OpenRLHF", error) + where

    def asked(estimator: str, unbiased: bool) -> Loss:
        return lambda logp, ref_logp, old_logp: compute_approx_kl(
            logp, ref_logp, old_logp, kl_estimator=estimator, unbiased_gradient=unbiased
        )

    def value(estimator: str) -> Pointwise:
        return lambda logp, ref_logp: compute_approx_kl(logp, ref_logp, kl_estimator=estimator)

    how = f"openrlhf {installed_version('openrlhf')}: compute_approx_kl, run"
    summed = f"{how}; summed from the token on, times the ratio, by kl_plugins"
    rows = [in_loss(f"OpenRLHF {k} in loss", how, asked(k, False)) for k in OPENRLHF_ESTIMATORS]
    rows.append(in_loss("OpenRLHF unbiased_gradient", how, asked("k3", True), weighted=True))
    return rows + [in_reward(f"OpenRLHF {k} in reward", summed, value(k)) for k in OPENRLHF_ESTIMATORS], ""


def _verl() -> tuple[list[Configuration], str]:
    try:
        with _quiet():
            kl_penalty = import_module("verl.trainer.ppo.core_algos").kl_penalty
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return [], _not_imported("verl", error)

    def asked(name: str) -> Loss:
        return lambda logp, ref_logp, _: kl_penalty(logp, ref_logp, name)

    rows = []
    for name in VERL_PENALTIES:
        with contextlib.suppress(NotImplementedError):  # older ones have no "+"
            asked(name)(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))
            how = f"verl {installed_version('verl')}: core_algos.kl_penalty, run"
            rows.append(in_loss(f"verl {name} in loss", how, asked(name)))
    return rows, ""


def _not_imported(host: str, error: Exception) -> str:
    if not installed_version(host.lower()):
        return f"{host} is not installed"
    return f"{host} is installed, but can't be imported: {_first_line(error)}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: Any) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
