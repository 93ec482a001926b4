"""What is judged: a KL term as a function from scored tokens to the gradient that it sends into the logits."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kl_plugins.core.exact import exact_kl
from kl_plugins.core.registry import get_loss
from kl_plugins.core.spec import KLSpec
from kl_plugins.core.terms import KLTerms, assign_credit, kl_terms
from kl_plugins.errors import ConfigError

KINDS = ("loss", "reward", "coefficient")
GROUP = 8
"""Completions per prompt in the batches that a grouped term is measured on."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Sampled tokens as a KL term sees them: (B, T) tensors, nats."""

    logp: Tensor
    """Log-probs of the current policy, detached; a function that is differentiated gets a live copy."""
    ref_logp: Tensor
    mask: Tensor
    """bool: 1 where the token counts."""
    old_logp: Tensor
    """Log-probs of what the trainer takes for the policy that drew the tokens; on-policy the same as `logp`."""
    engine_logp: Tensor | None = None
    """Log-probs of the rollout engine, where they aren't `old_logp`."""
    group_size: int = 1
    """Completions per prompt, which are consecutive rows."""
    tokens: Tensor | None = None
    """int64: the tokens, given where `logits` are."""
    logits: Tensor | None = None
    """(B, T, V) logits of the policy, and in `ref_logits` of the reference, where whole distributions are known."""
    ref_logits: Tensor | None = None

    @property
    def behavior_logp(self) -> Tensor:
        """The log-probs of the policy that drew the tokens."""
        return self.old_logp if self.engine_logp is None else self.engine_logp


Coefficient = Callable[[Scored], Tensor]
"""(B, T): what multiplies the score grad log pi(y_t) in the gradient of the sum over rows."""
Gradient = Callable[[Scored], Tensor]
"""(B, T, V): the gradient of the sum over rows with respect to the policy's logits."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A KL term to be judged.

    `coefficient` for terms of the sampled tokens' log-probs, `gradient` for those that use whole distributions.
    Both are for the sum over tokens, averaged over sequences and multiplied by their number.
    """

    name: str
    claims: str = ""
    """Whose gradient it is said to have, of `kl_plugins.core.registry.GRADIENTS`; empty: nothing is claimed."""
    coefficient: Coefficient | None = None
    gradient: Gradient | None = None
    grouped: bool = False
    """Whether a row's gradient depends on the other rows of its group."""
    knows_engine: bool = False
    """Whether it is told the log-probs of the rollout engine."""
    origin: str = ""
    """Which function is run, for reports."""

    def logit_gradient(self, scored: Scored) -> Tensor:
        """(B, T, V): what each position adds to the gradient with respect to the policy's logits."""
        if self.gradient is not None:
            return self.gradient(scored)
        assert self.coefficient is not None, f"{self.name} has neither a coefficient nor a gradient"
        assert scored.tokens is not None
        assert scored.logits is not None
        coefficient = self.coefficient(scored).to(scored.logits)
        score = -scored.logits.softmax(-1)
        score.scatter_add_(-1, scored.tokens[..., None], torch.ones_like(score[..., :1]))
        return coefficient[..., None] * score


def from_function(function: Callable[..., Tensor], *, kind: str = "loss", **fields: Any) -> Subject:
    """A subject from a framework's own function.

    Args:
        function: `function(logp, ref_logp, mask, old_logp)`; it may leave out the last one or two, and is given
            `engine_logp` and `group_size` if it names them. Every tensor is (B, T); `mask` is bool.
        kind: `"loss"`: it returns (B, T) losses, which are summed where the mask is 1, or a scalar, which is taken for
            the mean over sequences of their sums over tokens and then called one sequence at a time (or one group, if
            `grouped`). `"reward"`: (B, T) penalties, frozen at rollout (`logp` is the old policy's) and summed from
            the token on. `"coefficient"`: (B, T) coefficients of the score.
        fields: Of `Subject`.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r}: choose from {', '.join(map(repr, KINDS))}")
    call = _caller(function)
    if kind == "loss":
        coefficient = _differentiated(call, grouped=fields.get("grouped", False))
    elif kind == "reward":
        coefficient = _penalty(call)
    else:

        def coefficient(scored: Scored) -> Tensor:
            return torch.where(scored.mask, _of_tokens(call(scored, scored.logp), scored).detach(), 0.0)

    fields.setdefault("name", getattr(function, "__name__", repr(function)))
    fields.setdefault("knows_engine", "engine_logp" in _named(function))
    return Subject(coefficient=coefficient, **fields)


def load(path: str) -> Callable[..., Tensor]:
    """The function at `package.module:name`, also of a file here. Raises `ConfigError` with what is missing."""
    module, _, name = path.partition(":")
    if not name:
        raise ConfigError(f"{path!r}: write package.module:function")
    if str(Path.cwd()) not in sys.path:  # as `python -m pytest` does
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{path!r} can't be loaded: {error}") from error
    if not callable(found):
        raise ConfigError(f"{path!r} is a {type(found).__name__}, not a function")
    function: Callable[..., Tensor] = found
    return function


def from_spec(spec: KLSpec, **fields: Any) -> Subject:
    """A subject from one of kl_plugins' own configurations; `fields` are of `Subject`."""
    of: dict[str, Any] = {"claims": spec.gradient_of, "grouped": bool(spec.baseline), "knows_engine": True}
    fields = of | {"origin": "kl_plugins.kl_terms"} | fields
    fields.setdefault("name", f"{spec.name} {spec.credit}")
    if get_loss(spec.name).exact:
        return Subject(gradient=_exact_registered(spec), **fields)

    return Subject(coefficient=lambda scored: terms_of(spec, scored).score_coefficient, **fields)


def terms_of(spec: KLSpec, scored: Scored) -> KLTerms:
    """`kl_terms` of a sampled configuration."""
    return kl_terms(
        spec,
        logp=scored.logp,
        ref_logp=scored.ref_logp,
        mask=scored.mask,
        behavior_logp=scored.behavior_logp,
        group_size=scored.group_size if spec.baseline else None,
    )


def _exact_registered(spec: KLSpec) -> Gradient:
    """Of a registered configuration that sums over the vocabulary: its loss, differentiated to the logits."""

    def gradient(scored: Scored) -> Tensor:
        assert scored.logits is not None
        assert scored.ref_logits is not None
        assert scored.tokens is not None
        live = scored.logits.detach().clone().requires_grad_()
        logp = live.log_softmax(-1).gather(-1, scored.tokens[..., None])[..., 0]
        terms = kl_terms(
            spec,
            logp=logp,
            ref_logp=scored.ref_logp,
            mask=scored.mask,
            behavior_logp=scored.behavior_logp,
            group_size=scored.group_size if spec.baseline else None,
            exact=exact_kl(spec, logits=live, ref_logits=scored.ref_logits, mask=scored.mask, tokens=scored.tokens),
        )
        return torch.autograd.grad(terms.loss.sum(), live)[0]

    return gradient


def _named(function: Callable[..., Tensor]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a compiled function there may be none
        return inspect.signature(lambda logp, ref_logp: None).parameters


def _caller(function: Callable[..., Tensor]) -> Callable[[Scored, Tensor], Tensor]:
    """Calls `function` with the tensors that its signature asks for, by position or by name."""
    parameters = _named(function)
    more = [name for name in ("engine_logp", "group_size") if name in parameters]
    positional = [
        p
        for p in parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        and p.name not in more
        and (p.default is p.empty or p.name in ("mask", "old_logp"))
    ]
    count = 4 if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()) else len(positional)
    if not 2 <= count <= 4:
        raise ConfigError(
            f"{function!r} takes {count} tensors: a KL function takes (logp, ref_logp), (logp, ref_logp, mask) or "
            "(logp, ref_logp, mask, old_logp); write an adapter of one line"
        )

    needed = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if unknown := set(needed) - set(more):
        raise ConfigError(f"{function!r} needs {', '.join(sorted(unknown))}: write an adapter of one line")

    def call(scored: Scored, logp: Tensor) -> Tensor:
        given = (logp, scored.ref_logp, scored.mask, scored.old_logp)[:count]
        try:
            found: Any = function(*given, **{name: getattr(scored, name) for name in more})
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise ConfigError(
                f"{function!r}, given {count} tensors of shape {tuple(logp.shape)}, raised "
                f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
            ) from error
        if not isinstance(found, Tensor):
            raise ConfigError(f"{function!r} returned a {type(found).__name__}: a tensor was expected")
        return found

    return call


def _differentiated(call: Callable[[Scored, Tensor], Tensor], *, grouped: bool) -> Coefficient:
    def derivative(scored: Scored, *, together: bool = False) -> Tensor | None:
        """Of a (B, T) loss; None if it is a scalar, which only makes sense for one sequence, or group, at a time."""
        live = scored.logp.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = call(scored, live)
            if loss.shape == live.shape:
                total = torch.where(scored.mask, loss, 0.0).sum()
            elif loss.numel() == 1 and (together or len(live) == (scored.group_size if grouped else 1)):
                total = loss.sum() * len(live)
            elif loss.numel() == 1:
                return None
            else:
                raise ConfigError(
                    f"the function returned a tensor of shape {tuple(loss.shape)} for log-probs of shape "
                    f"{tuple(live.shape)}: a KL loss is of that shape, or a scalar"
                )
            if not total.requires_grad:
                return torch.zeros_like(live)
            (found,) = torch.autograd.grad(total, live, allow_unused=True)
        return torch.zeros_like(live) if found is None else found

    def coefficient(scored: Scored) -> Tensor:
        found = derivative(scored)
        step = scored.group_size if grouped else 1
        if found is None and scored.logp.size(1) == 1:
            # Of sequences of one token a mean is a mean over them all, however it is weighted.
            found = derivative(scored, together=True)
            first, last = (derivative(rows(scored, i, i + step)) for i in (0, len(scored.logp) - step))
            ends = torch.cat([x for x in (first, last) if x is not None])
            if found is not None and not torch.equal(torch.cat([found[:step], found[-step:]]), ends):
                found = None
        if found is None:
            parts = [derivative(rows(scored, start, start + step)) for start in range(0, len(scored.logp), step)]
            found = torch.cat([part for part in parts if part is not None])
        return found

    return coefficient


def _of_tokens(found: Tensor, scored: Scored) -> Tensor:
    """`found`, unchanged. Raises `ConfigError` unless it holds one number for each token."""
    if found.shape != scored.logp.shape:
        raise ConfigError(
            f"the function returned a tensor of shape {tuple(found.shape)} for log-probs of shape "
            f"{tuple(scored.logp.shape)}: penalties and coefficients are of that shape"
        )
    return found


def _penalty(call: Callable[[Scored, Tensor], Tensor]) -> Coefficient:
    def coefficient(scored: Scored) -> Tensor:
        with torch.no_grad():
            value = torch.where(scored.mask, _of_tokens(call(scored, scored.old_logp), scored), 0.0)
            ratio = torch.where(scored.mask, (scored.logp - scored.old_logp).exp(), 0.0)
            return ratio * assign_credit(value, "to_go")

    return coefficient


def rows(scored: Scored, start: int, stop: int) -> Scored:
    """The rows of a batch from `start` up to `stop`."""
    names = ("logp", "ref_logp", "mask", "old_logp", "engine_logp", "tokens", "logits", "ref_logits")
    return replace(scored, **{n: getattr(scored, n)[start:stop] for n in names if getattr(scored, n) is not None})


__all__ = ["KINDS", "Scored", "Subject", "from_function", "from_spec", "load", "rows"]
